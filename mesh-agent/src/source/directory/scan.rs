//! One walk through the manifest directory: which files there are, and which have to be read again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::file::{FileObjects, MAX_FILE};

/// Deepest directory below the root.
const MAX_DEPTH: usize = 32;
/// Most files.
const MAX_FILES: usize = 100_000;
/// A file changed so recently may change again without its times saying so.
const RACY: Duration = Duration::from_secs(2);

/// The files of a directory tree, by path below it.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
    files: BTreeMap<String, File>,
    /// What is wrong with directories: (path, message).
    problems: Vec<(String, String)>,
}

#[derive(Debug, Default)]
struct File {
    fingerprint: Option<Fingerprint>,
    digest: Option<[u8; 32]>,
    objects: FileObjects,
}

/// Changes when a file's content may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Tree {
    /// Nothing read yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), files: BTreeMap::new(), problems: Vec::new() }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The files that hold manifests, by path.
    pub fn files(&self) -> impl Iterator<Item = (&str, &FileObjects)> {
        self.files.iter().map(|(path, file)| (path.as_str(), &file.objects))
    }

    /// Directories that could not be walked: (path, message).
    pub fn problems(&self) -> &[(String, String)] {
        &self.problems
    }

    /// Walks the tree and reads what changed; everything when `all`. `enter` is called with each directory
    /// before it is listed, so that a watch set there misses nothing. An error means that the root itself
    /// cannot be read; everything read before is kept.
    pub fn scan(&mut self, all: bool, enter: &mut dyn FnMut(&Path)) -> io::Result<()> {
        enter(&self.root);
        // Told apart from an empty directory: this one says nothing, so nothing is deleted.
        let root = fs::metadata(&self.root)?;
        if !root.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        fs::read_dir(&self.root)?;
        let mut walk = Walk { enter, found: BTreeMap::new(), seen: BTreeSet::new(), problems: Vec::new() };
        walk.seen.insert((root.dev(), root.ino()));
        walk.directory(&self.root, "", 0);
        let Walk { found, problems, .. } = walk;
        // A directory that cannot be listed says nothing about its files.
        let unknown = |path: &str| problems.iter().any(|(dir, _)| path.starts_with(&format!("{dir}/")));
        self.files.retain(|path, _| found.contains_key(path) || unknown(path));
        for (path, metadata) in found {
            let file = self.files.entry(path.clone()).or_default();
            if file.read(&self.root.join(&path), &metadata, all) == Outcome::Gone {
                self.files.remove(&path);
            }
        }
        self.problems = problems;
        Ok(())
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    There,
    Gone,
}

impl File {
    fn read(&mut self, path: &Path, metadata: &Metadata, all: bool) -> Outcome {
        let fingerprint = Fingerprint::of(metadata);
        if !all && self.fingerprint == Some(fingerprint) {
            return Outcome::There;
        }
        let broken = match read_bounded(path) {
            Ok(bytes) => {
                let digest: [u8; 32] = Sha256::digest(&*bytes).into();
                if self.digest != Some(digest) {
                    let json = path.extension().is_some_and(|extension| extension == "json");
                    self.objects = FileObjects::parse(&self.objects, json, bytes);
                    self.digest = Some(digest);
                }
                self.fingerprint = (!fingerprint.is_racy()).then_some(fingerprint);
                return Outcome::There;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Outcome::Gone,
            Err(error) => error,
        };
        self.objects = self.objects.broken("Unreadable", broken.to_string());
        self.digest = None;
        self.fingerprint = None;
        Outcome::There
    }
}

impl Fingerprint {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether a further change could leave the fingerprint as it is: file times are coarse.
    fn is_racy(&self) -> bool {
        let changed = UNIX_EPOCH + Duration::from_secs(self.changed.0.max(0).unsigned_abs());
        SystemTime::now().duration_since(changed).is_ok_and(|age| age < RACY)
    }
}

/// A file's content, if it is not larger than any manifest.
pub(super) fn read_bounded(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = fs::File::open(path)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(file.metadata()?.len().min(MAX_FILE) as usize + 1));
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("larger than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

struct Walk<'a> {
    enter: &'a mut dyn FnMut(&Path),
    found: BTreeMap<String, Metadata>,
    /// Device and inode of everything taken, so that links neither loop nor count twice.
    seen: BTreeSet<(u64, u64)>,
    problems: Vec<(String, String)>,
}

impl Walk<'_> {
    fn directory(&mut self, path: &Path, below: &str, depth: usize) {
        let entries = match fs::read_dir(path).and_then(|entries| entries.collect::<io::Result<Vec<_>>>()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return self.problems.push((below.to_owned(), error.to_string())),
        };
        // A name that is not UTF-8 is shown with replacement characters, but nothing we read has such.
        let mut names: Vec<String> =
            entries.iter().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        for name in names {
            // Editors' and carriers' temporary files, and the inner life of a mounted ConfigMap.
            if name.starts_with('.') {
                continue;
            }
            let below = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
            self.entry(&path.join(&name), below, depth + 1);
        }
    }

    fn entry(&mut self, path: &Path, below: String, depth: usize) {
        // Follows links. One that leads nowhere is a file being replaced, or nothing.
        let Ok(metadata) = fs::metadata(path) else { return };
        let manifest = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        let wanted = metadata.is_dir() || (metadata.is_file() && manifest);
        if !wanted {
            return;
        }
        if !self.seen.insert((metadata.dev(), metadata.ino())) {
            return;
        }
        if metadata.is_dir() {
            if depth > MAX_DEPTH {
                return self.problems.push((below, format!("more than {MAX_DEPTH} directories deep")));
            }
            (self.enter)(path);
            return self.directory(path, &below, depth);
        }
        if self.found.len() >= MAX_FILES {
            let full = (below, format!("more than {MAX_FILES} files"));
            if self.problems.last().is_none_or(|last| last.1 != full.1) {
                self.problems.push(full);
            }
            return;
        }
        // The target of a link changes in another directory than the link.
        if fs::symlink_metadata(path).is_ok_and(|link| link.is_symlink())
            && let Ok(target) = fs::canonicalize(path)
            && let Some(parent) = target.parent()
        {
            (self.enter)(parent);
        }
        self.found.insert(below, metadata);
    }
}
