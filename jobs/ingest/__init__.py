"""What `prepare` reads: layouts of recordings and transcripts."""
