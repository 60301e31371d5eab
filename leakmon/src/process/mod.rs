//! What the system says of a process: identity, memory.
