"""Commands of `python -m crl_exp`: each module has `main(argv)`."""
