"""EK-FAC: spectral filters, factors, and their fit."""
