"""Forms of an answer: what a text says, so that two texts which say the same are found equal and others are not.

A text is read as one form or as a few (`1,500` is a number and a list); two texts are equal where one reading of each is.
"""
