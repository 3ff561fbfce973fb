"""What sets are made from: image folders, tables, Hugging Face data sets and tars, as rows with labels and classes.

Imports data, storage and errors, and prepare's index; prepare imports it.
"""
