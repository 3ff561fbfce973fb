"""Bytes in and out: files, folders, web servers and buckets; addresses and their secrets; records from outside.

Imports errors alone; everything may import it.
"""
