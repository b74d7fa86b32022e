"""How the shipped SAEs are made: text, residuals, training, quality."""
