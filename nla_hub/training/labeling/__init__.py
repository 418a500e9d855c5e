"""The labelers that ask a language model: behind an API, in this process, or in another pair."""
