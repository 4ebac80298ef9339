//! Carrying announcements to the other nodes.
