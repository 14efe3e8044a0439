"""`baton bench`: load from the client's side, and engines without a server; options are vLLM's."""
