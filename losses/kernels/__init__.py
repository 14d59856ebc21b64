"""The maths of `functional`, formed without the matrix of all pairs."""
