//! The key on disk.
