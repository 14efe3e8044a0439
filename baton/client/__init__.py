"""What talks to a running fleet over HTTP: terminal, batches, benchmarks' requests, remote LLM."""
