"""Two real models that run on pa_ops: what `./run demo` shows."""
