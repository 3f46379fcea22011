"""Getting, making and inspecting the token shards that train_gpt.py reads."""
