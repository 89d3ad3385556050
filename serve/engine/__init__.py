"""The decoding engine: many AR streams at once. Knows neither Ray nor HTTP."""
