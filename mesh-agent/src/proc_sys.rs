//! Where kernel settings are read and written.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// Names another place than /proc/sys: a container's own is read-only, so the host's `net` is mounted elsewhere. What is
/// below it belongs to the network namespace of whoever reads and writes, wherever it is mounted.
pub const VARIABLE: &str = "MARGAY_PROC_SYS";

static ROOT: LazyLock<PathBuf> = LazyLock::new(|| match std::env::var_os(VARIABLE) {
    Some(path) if !path.is_empty() => path.into(),
    _ => "/proc/sys".into(),
});

/// The directory that has `net` below it.
pub fn root() -> &'static Path {
    &ROOT
}
