"""Our matcher and losses behind the interfaces of existing code bases: one module each, loaded when it is asked for."""
