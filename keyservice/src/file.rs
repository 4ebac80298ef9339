//! Files that must never be torn, swapped or shared: opened with checks, written with temp + fsync + rename.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process;

use nix::fcntl::OFlag;
use zeroize::Zeroizing;

/// Bits of a mode that let anyone but the owner in.
const SHARED: u32 = 0o077;
/// Bits of a mode that let anyone but the owner write.
const SHARED_WRITE: u32 = 0o022;

/// Why a file was refused or could not be worked with. The path is named by the error around it.
#[derive(Debug, thiserror::Error)]
pub enum FileProblem {
    /// The system said no.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was tried, in the infinitive.
        doing: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// A symbolic link: whoever may change the link decides what we read.
    #[error("is a symbolic link")]
    Symlink,
    /// A directory, FIFO, socket or device.
    #[error("is not a regular file")]
    NotRegular,
    /// Somebody else may change it at will.
    #[error("belongs to uid {owner}, not to uid {us}")]
    Owner {
        /// Its owner.
        owner: u32,
        /// Our effective uid.
        us: u32,
    },
    /// Group or others have a right they must not have.
    #[error("has mode {mode:04o}, which lets others {right} it; want {want:04o}")]
    Mode {
        /// The permission bits found.
        mode: u32,
        /// What they allow: "read" or "write".
        right: &'static str,
        /// The mode that would be accepted.
        want: u32,
    },
    /// Larger than anything we write.
    #[error("is longer than {0} bytes")]
    TooLong(u64),
}

impl FileProblem {
    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// Who may have access to a file we read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// The owner alone, who must be us: secrets and what we rest our decisions on.
    Private,
    /// Anyone: the file is checked as outside data.
    Public,
}

/// Reads a file of at most `limit` bytes; `None` when there is none.
///
/// The checks are made on the opened file, so that it cannot be swapped in between.
pub(crate) fn read(
    path: &Path,
    limit: u64,
    access: Access,
) -> Result<Option<Zeroizing<Vec<u8>>>, FileProblem> {
    // O_NONBLOCK: opening a FIFO must not wait for a writer.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ELOOP as i32) => {
            return Err(FileProblem::Symlink);
        }
        // A socket cannot be opened at all.
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENXIO as i32) => {
            return Err(FileProblem::NotRegular);
        }
        Err(source) => return Err(FileProblem::Io { doing: "open", source }),
    };
    let meta = file.metadata().map_err(FileProblem::io("stat"))?;
    if !meta.is_file() {
        return Err(FileProblem::NotRegular);
    }
    if access == Access::Private {
        check_private(&meta)?;
    }
    if meta.len() > limit {
        return Err(FileProblem::TooLong(limit));
    }
    // Room for all of it at once: a growing buffer would leave copies of a secret behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(meta.len() as usize + 32));
    file.take(limit + 1).read_to_end(&mut bytes).map_err(FileProblem::io("read"))?;
    if bytes.len() as u64 > limit {
        return Err(FileProblem::TooLong(limit));
    }
    Ok(Some(bytes))
}

fn check_private(meta: &std::fs::Metadata) -> Result<(), FileProblem> {
    let us = nix::unistd::geteuid().as_raw();
    if meta.uid() != us {
        return Err(FileProblem::Owner { owner: meta.uid(), us });
    }
    let mode = meta.mode() & 0o7777;
    if mode & SHARED != 0 {
        let right = if mode & SHARED_WRITE != 0 { "write" } else { "read" };
        return Err(FileProblem::Mode { mode, right, want: 0o600 });
    }
    Ok(())
}

/// The directory a file lives in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// Makes a directory, and those above it, with `mode` where they are missing.
pub(crate) fn ensure_dir(dir: &Path, mode: u32) -> Result<(), FileProblem> {
    if dir.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .map_err(FileProblem::io("create the directory"))?;
    sync_dir(parent(dir))
}

/// Makes the names in a directory survive a power cut.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), FileProblem> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(FileProblem::io("sync the directory"))
}

fn temp_prefix(path: &Path) -> String {
    // The leading dot hides it from watchers and globs.
    format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy())
}

const TEMP_SUFFIX: &str = ".tmp";

/// A complete, synced file beside its goal, removed on drop unless it was moved there.
pub(crate) struct Temp {
    path: PathBuf,
}

impl Temp {
    /// Writes `bytes` beside `goal` and syncs them.
    pub(crate) fn write(goal: &Path, bytes: &[u8], mode: u32) -> Result<Self, FileProblem> {
        for attempt in 0u32..1000 {
            let name = format!("{}{}.{attempt}{TEMP_SUFFIX}", temp_prefix(goal), process::id());
            let path = parent(goal).join(name);
            let mut file = match OpenOptions::new().write(true).create_new(true).mode(mode).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(source) => {
                    return Err(FileProblem::Io { doing: "create a temporary file beside it", source });
                }
            };
            let temp = Self { path };
            file.write_all(bytes).map_err(FileProblem::io("write"))?;
            // The umask may have taken bits away.
            file.set_permissions(std::fs::Permissions::from_mode(mode))
                .map_err(FileProblem::io("set the mode"))?;
            file.sync_all().map_err(FileProblem::io("sync"))?;
            return Ok(temp);
        }
        let source = io::Error::from(io::ErrorKind::AlreadyExists);
        Err(FileProblem::Io { doing: "find a free temporary name beside it", source })
    }

    /// Takes `goal`'s place, whatever was there.
    pub(crate) fn replace(self, goal: &Path) -> Result<(), FileProblem> {
        std::fs::rename(&self.path, goal).map_err(FileProblem::io("rename into place"))?;
        std::mem::forget(self);
        sync_dir(parent(goal))
    }

    /// Becomes `goal` unless something is there already: then `false`. Also `false` when a racing
    /// process swept the temporary file away, which it does only once `goal` exists.
    pub(crate) fn claim(self, goal: &Path) -> Result<bool, FileProblem> {
        match std::fs::hard_link(&self.path, goal) {
            Ok(()) => {
                drop(self);
                sync_dir(parent(goal)).map(|()| true)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {
                Ok(false)
            }
            Err(source) => Err(FileProblem::Io { doing: "link into place", source }),
        }
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        // What stays behind is swept by the next start.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes temporary files that a crash left beside `goal`.
pub(crate) fn sweep(goal: &Path) {
    let prefix = temp_prefix(goal);
    let Ok(entries) = std::fs::read_dir(parent(goal)) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let middle = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(TEMP_SUFFIX));
        if middle.is_some_and(|m| !m.is_empty() && m.bytes().all(|b| b.is_ascii_digit() || b == b'.')) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Replaces `goal` with `bytes`: after a crash it holds the old content or the new, never a part.
pub(crate) fn write(goal: &Path, bytes: &[u8], mode: u32) -> Result<(), FileProblem> {
    sweep(goal);
    Temp::write(goal, bytes, mode)?.replace(goal)
}
