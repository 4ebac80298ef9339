//! Memory of the process. Decoding a large cluster takes much of it for a moment, and glibc would keep that for ever.

#![allow(unsafe_code, reason = "the allocator's own calls")]

/// To be called before there are threads: each would get a heap of its own, which keeps what was ever needed in it.
pub fn frugal() {
    #[cfg(target_env = "gnu")]
    {
        const HEAPS: libc::c_int = 2;
        /// What is at least so large is given back when it is freed; without a word glibc moves that limit up to 32 MiB.
        const LARGE: libc::c_int = 128 * 1024;
        // SAFETY: mallopt has no precondition; a value that it refuses changes nothing.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, HEAPS);
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
            libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
        }
    }
}

/// Gives back what is free. It takes some milliseconds, so it is for after a list of everything.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim has no precondition.
    unsafe {
        libc::malloc_trim(0);
    }
}
