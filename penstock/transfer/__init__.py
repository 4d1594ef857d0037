"""How KV blocks cross from one pool into another: registered regions, spans, sessions (pure)."""
