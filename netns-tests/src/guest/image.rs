//! What a guest boots: Debian's kernel from the cache, and an initramfs made of the machine's own programs with their
//! libraries, the programs under test, and the kernel's modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::directory;
use crate::bins::Bins;

/// Of the machine.
const TOOLS: [&str; 11] = ["ip", "wg", "nft", "ping", "modprobe", "sh", "cat", "ln", "ls", "rm", "mount"];
/// Ours.
const PROGRAMS: [&str; 5] = ["mesh-lab", "mesh-agent", "mesh-datapath", "mesh-cni", "meshctl"];
/// Below the kernel's module directory: a guest has a network and no disk, screen or sound.
const MODULES: [&str; 10] = [
    "kernel/net",
    "kernel/lib",
    "kernel/crypto",
    "kernel/arch",
    "kernel/drivers/net/wireguard",
    "kernel/drivers/net/virtio_net.ko.xz",
    "kernel/drivers/net/net_failover.ko.xz",
    "kernel/drivers/net/veth.ko.xz",
    "kernel/drivers/net/tun.ko.xz",
    "kernel/drivers/net/vxlan",
];

/// The kernel that `.ci/peers` fetched.
pub fn kernel() -> Result<PathBuf> {
    let boot = directory().join("boot");
    let mut found: Vec<PathBuf> = fs::read_dir(&boot)
        .with_context(|| format!("{}: run .ci/peers", boot.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .collect();
    found.sort();
    found.pop().with_context(|| format!("no kernel in {}: run .ci/peers", boot.display()))
}

/// Files of an initramfs by path; `usr/` is merged, as on Debian.
#[derive(Debug, Default)]
struct Files(BTreeMap<String, Entry>);

#[derive(Debug)]
enum Entry {
    Directory,
    Link(String),
    File(Vec<u8>, u32),
}

/// An initramfs with all that a node needs, and `more` programs in /usr/bin.
pub fn initramfs(bins: &Bins, more: &[&Path]) -> Result<Vec<u8>> {
    let mut files = Files::default();
    for link in ["bin", "sbin", "lib", "lib64"] {
        files.0.insert(link.into(), Entry::Link(format!("usr/{link}")));
        files.directory(&format!("usr/{link}"));
    }
    for name in PROGRAMS {
        files.program(&bins.program(name)?, &format!("usr/bin/{name}"))?;
    }
    for program in more {
        let name = program.file_name().context("program has no name")?.to_string_lossy();
        files.program(program, &format!("usr/bin/{name}"))?;
    }
    for tool in TOOLS {
        let path = find(tool)?;
        // The kernel calls modprobe by this name.
        let directory = if tool == "modprobe" { "usr/sbin" } else { "usr/bin" };
        files.program(&path, &format!("{directory}/{tool}"))?;
    }
    files.modules()?;
    Ok(files.cpio())
}

fn find(tool: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/usr/bin:/sbin:/bin";
    let candidates = path.split(':').map(|directory| Path::new(directory).join(tool));
    let mut found = candidates.filter(|path| path.is_file());
    found.next().with_context(|| format!("{tool} is not installed: run .ci/setup"))
}

/// The place of a file of the machine in a tree with a merged `usr/`.
fn merged(path: &Path) -> String {
    let path = path.to_string_lossy();
    let path = path.trim_start_matches('/');
    if path.starts_with("usr/") { path.into() } else { format!("usr/{path}") }
}

impl Files {
    fn directory(&mut self, path: &str) {
        let mut at = String::new();
        for part in path.split('/') {
            at = if at.is_empty() { part.into() } else { format!("{at}/{part}") };
            self.0.entry(at.clone()).or_insert(Entry::Directory);
        }
    }

    fn file(&mut self, path: &str, content: Vec<u8>, mode: u32) {
        if let Some((directory, _)) = path.rsplit_once('/') {
            self.directory(directory);
        }
        self.0.insert(path.into(), Entry::File(content, mode));
    }

    /// A program without its debug information, and the libraries it needs.
    fn program(&mut self, source: &Path, path: &str) -> Result<()> {
        let stripped = tempfile()?;
        let strip = Command::new("strip")
            .args(["--strip-debug", "-o"])
            .arg(&stripped.0)
            .arg(source)
            .output()
            .context("run strip (binutils)")?;
        // A script cannot be stripped, and need not.
        let from = if strip.status.success() { &stripped.0 } else { source };
        let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.file(path, content, 0o755);
        let output = Command::new("ldd").arg(source).output().context("run ldd (libc-bin)")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let libraries: BTreeSet<&str> =
            text.split_whitespace().filter(|word| word.starts_with('/')).collect();
        for library in libraries {
            let place = merged(Path::new(library));
            if !self.0.contains_key(&place) {
                let content = fs::read(library).with_context(|| format!("read {library}"))?;
                self.file(&place, content, 0o755);
            }
        }
        Ok(())
    }

    fn modules(&mut self) -> Result<()> {
        let root = directory().join("lib/modules");
        let mut versions: Vec<PathBuf> = fs::read_dir(&root)
            .with_context(|| root.display().to_string())?
            .flatten()
            .map(|e| e.path())
            .collect();
        versions.sort();
        let version =
            versions.pop().with_context(|| format!("{} is empty: run .ci/peers", root.display()))?;
        let below = format!("usr/lib/modules/{}", version.file_name().context("version")?.to_string_lossy());
        let mut pending: Vec<PathBuf> = MODULES.iter().map(|module| version.join(module)).collect();
        // The indices: modules.dep and such.
        pending.extend(fs::read_dir(&version)?.flatten().map(|e| e.path()).filter(|path| path.is_file()));
        while let Some(path) = pending.pop() {
            if path.is_dir() {
                pending.extend(fs::read_dir(&path)?.flatten().map(|entry| entry.path()));
            } else {
                let name = path.strip_prefix(&version)?.to_string_lossy().into_owned();
                let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                self.file(&format!("{below}/{name}"), content, 0o644);
            }
        }
        if !self.0.contains_key(&format!("{below}/modules.dep")) {
            bail!("{} has no modules.dep: run .ci/peers", version.display());
        }
        Ok(())
    }

    /// As the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst, `newc`).
    fn cpio(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (inode, (path, entry)) in self.0.iter().enumerate() {
            let (mode, content): (u32, &[u8]) = match entry {
                Entry::Directory => (0o040755, &[]),
                Entry::Link(to) => (0o120777, to.as_bytes()),
                Entry::File(content, mode) => (0o100000 | mode, content),
            };
            member(&mut out, inode + 1, path, mode, content);
        }
        member(&mut out, 0, "TRAILER!!!", 0, &[]);
        out
    }
}

fn member(out: &mut Vec<u8>, inode: usize, path: &str, mode: u32, content: &[u8]) {
    let fields = [inode, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, path.len() + 1, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(content);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// A file that goes when dropped.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

fn tempfile() -> Result<Temporary> {
    let name = format!("mesh-lab-{}-{:08x}", std::process::id(), rand::random::<u32>());
    let path = std::env::temp_dir().join(name);
    fs::write(&path, []).with_context(|| format!("write {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(Temporary(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_read_back_by_cpios_own_rules() {
        let mut files = Files::default();
        files.0.insert("bin".into(), Entry::Link("usr/bin".into()));
        files.file("usr/bin/x", b"abc".to_vec(), 0o755);
        let archive = files.cpio();
        let (mut at, mut seen) = (0, Vec::new());
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&archive[at + 6 + 8 * n..at + 14 + 8 * n]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name) = (field(1), field(6), field(11));
            let path = std::str::from_utf8(&archive[at + 110..at + 110 + name - 1]).unwrap();
            let start = (at + 110 + name).next_multiple_of(4);
            let content = &archive[start..start + size];
            at = (start + size).next_multiple_of(4);
            if path == "TRAILER!!!" {
                break;
            }
            seen.push((path.to_string(), mode, content.to_vec()));
        }
        assert_eq!(at, archive.len());
        let paths: Vec<&str> = seen.iter().map(|(path, ..)| path.as_str()).collect();
        assert_eq!(paths, ["bin", "usr", "usr/bin", "usr/bin/x"]);
        assert_eq!((seen[0].1, seen[0].2.as_slice()), (0o120777, b"usr/bin".as_slice()));
        assert_eq!((seen[3].1, seen[3].2.as_slice()), (0o100755, b"abc".as_slice()));
    }
}
