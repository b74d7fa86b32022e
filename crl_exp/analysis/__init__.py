"""Pure functions: numbers in, numbers out, without models, files or configs.

Statistics and power, the winner's curse, sums and histograms of features, logistic regression, how
an SAE fits, and random numbers that belong to a row. Each says where its formula is from.
"""
