"""The data room: shards in object storage, the order in which clips are seen, and how they are read."""
