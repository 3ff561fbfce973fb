"""Existing sets: statistics, verification, repair, contact sheets.

Imports data, recipe, storage and errors, and prepare's index and adopt; prepare's merge and launch import it.
"""
