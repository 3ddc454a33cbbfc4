"""The teacher: one async client for any endpoint that speaks the Chat Completions API of OpenAI."""
