"""Reading and writing bytes: files, folders, web servers and buckets; secrets in addresses; untrusted JSON; Python
files of users.

Imports only errors and the heartbeat; everything may import it.
"""
