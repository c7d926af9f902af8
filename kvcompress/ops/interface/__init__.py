"""The C interface of the kernels, said once: ctypes lays structs out from here, and `header` writes them for C."""
