"""Reading and writing bytes: files, folders, web servers and buckets; secrets in addresses; untrusted JSON.

Imports only errors and the heartbeat; everything may import it.
"""
