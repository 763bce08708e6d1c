"""Tables, figures and sweeps: which experiments they need, and what their records say."""
