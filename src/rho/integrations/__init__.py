"""Selection inside other people's trainers: thin, and imported only when asked for."""
