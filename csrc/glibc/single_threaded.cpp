// libstdc++ asks glibc 2.32 for this variable: may a reference count do without atomic instructions? Ours, hidden, says no.
extern "C" {
char __libc_single_threaded = 0;
}
