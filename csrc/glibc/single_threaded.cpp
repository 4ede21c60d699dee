// libstdc++ asks this variable of glibc 2.32 whether a reference count may do without atomic instructions. Ours, hidden, says no.
extern "C" {
char __libc_single_threaded = 0;
}
