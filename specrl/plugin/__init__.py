"""What runs inside SGLang: a learned policy for its lookahead, and traces for whoever learns. Off unless asked for."""
