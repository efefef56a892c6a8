"""Calibration: which codes a matrix gets in a format of groups, given how its inputs are distributed. One file an algorithm."""
