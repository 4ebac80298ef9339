//! Files that are written whole or not at all, and removed.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};

/// Ends the name of a file that is being written. Runtimes read no such names, and it begins with a dot besides.
const UNFINISHED: &str = ".mesh-cni-unfinished";
/// Written at once.
const CHUNK: usize = 1 << 20;

/// Called before each change; an error stops there, as being killed would.
type Step<'a> = Box<dyn FnMut() -> io::Result<()> + 'a>;

/// Where the changes are made.
pub(super) struct Disk<'a> {
    step: Step<'a>,
}

impl Default for Disk<'_> {
    fn default() -> Self {
        Self { step: Box::new(|| Ok(())) }
    }
}

/// Keeps other installers out of the directory, until it is dropped.
pub(super) fn lock(directory: &Path) -> anyhow::Result<Flock<File>> {
    let file = File::open(directory).with_context(|| format!("{}", directory.display()))?;
    match Flock::lock(file, FlockArg::LockExclusive) {
        Ok(lock) => Ok(lock),
        Err((_, errno)) => bail!("{}: lock: {errno}", directory.display()),
    }
}

impl<'a> Disk<'a> {
    #[cfg(test)]
    pub(super) fn with_steps(step: impl FnMut() -> io::Result<()> + 'a) -> Self {
        Self { step: Box::new(step) }
    }

    /// Puts a file in place, if it is not there just so; says what was done. A program that runs keeps its own file.
    pub(super) fn put(&mut self, path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<String> {
        let is_there = fs::symlink_metadata(path).is_ok_and(|file| {
            file.is_file()
                && file.permissions().mode() & 0o7777 == mode
                && fs::read(path).is_ok_and(|there| there == bytes)
        });
        if is_there {
            return Ok(format!("{} is up to date", path.display()));
        }
        let unfinished = unfinished(path)?;
        // No clean-up after an error: the next start overwrites it, and a killed one could not do it either.
        self.write(&unfinished, bytes, mode).with_context(|| format!("{}", unfinished.display()))?;
        (self.step)()?;
        fs::rename(&unfinished, path).with_context(|| format!("{}", path.display()))?;
        self.sync_directory(path)?;
        Ok(format!("wrote {}", path.display()))
    }

    fn write(&mut self, path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
        (self.step)()?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        (self.step)()?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        for chunk in bytes.chunks(CHUNK.min(bytes.len() / 3 + 1)) {
            (self.step)()?;
            file.write_all(chunk)?;
        }
        // Whatever the umask.
        file.set_permissions(Permissions::from_mode(mode))?;
        (self.step)()?;
        file.sync_all()
    }

    /// Removes a file.
    pub(super) fn remove(&mut self, path: &Path) -> anyhow::Result<String> {
        (self.step)()?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("{}", path.display()));
            }
            _ => {}
        }
        self.sync_directory(path)?;
        Ok(format!("removed {}", path.display()))
    }

    /// Removes what installers that were killed left.
    pub(super) fn sweep(&mut self, directory: &Path) -> anyhow::Result<Vec<String>> {
        let mut done = Vec::new();
        for entry in fs::read_dir(directory).with_context(|| format!("{}", directory.display()))? {
            let path = entry.with_context(|| format!("{}", directory.display()))?.path();
            if path.to_string_lossy().ends_with(UNFINISHED) {
                done.push(self.remove(&path)?);
            }
        }
        Ok(done)
    }

    fn sync_directory(&mut self, path: &Path) -> anyhow::Result<()> {
        (self.step)()?;
        let directory = path.parent().unwrap_or(Path::new("."));
        let synced = File::open(directory).and_then(|file| file.sync_all());
        synced.with_context(|| format!("{}", directory.display()))
    }
}

/// Where a file is written before it takes its place.
fn unfinished(path: &Path) -> anyhow::Result<PathBuf> {
    let name = path.file_name().with_context(|| format!("{}: has no file name", path.display()))?;
    Ok(path.with_file_name(format!(".{}{UNFINISHED}", name.to_string_lossy())))
}
