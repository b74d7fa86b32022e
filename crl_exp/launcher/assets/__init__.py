"""`python -m crl_exp assets`: published archives fetched, checked and converted into the cache."""
