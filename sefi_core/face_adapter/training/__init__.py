"""Training face adapters: settings, and which photos go together. The loop is that of encoders."""
