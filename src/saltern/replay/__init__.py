"""The replay: recorded traffic through the same core that serves, to see what memory and guarantees would do."""
