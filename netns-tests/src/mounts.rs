//! A host's private files: what a real host would have for itself, the rest shared with the machine.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

/// Directories that are a host's own, by parent. They stay when the lab reboots the host (see
/// [`crate::host::Host`]).
pub const DISK: [&str; 6] =
    ["etc/margay", "etc/cni", "etc/kubernetes", "var/lib/margay", "var/lib/cni", "var/lib/etcd"];

/// Gives the calling process's mount namespace its own /run, /proc, /sys, /sys/fs/bpf and the directories
/// of margay, CNI, Kubernetes and etcd. The caller has new mount, PID and network namespaces.
pub fn make_private() -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
    fresh("tmpfs", "/run", Some("mode=755"))?;
    shadow("/etc", &["margay", "cni", "kubernetes"])?;
    shadow("/var/lib", &["margay", "cni", "etcd"])?;
    shadow("/var/log", &["margay"])?;
    fresh("proc", "/proc", None)?;
    fresh("sysfs", "/sys", None)?;
    fresh("bpf", "/sys/fs/bpf", Some("mode=755"))?;
    Ok(())
}

fn fresh(kind: &str, at: &str, options: Option<&str>) -> Result<()> {
    mount(Some(kind), at, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("mount a {kind} on {at}"))
}

/// Puts a tmpfs over `parent` with links to everything that was there, and the directories in `own` new and
/// empty: no mount point has to exist on the machine, so none is left behind.
fn shadow(parent: &str, own: &[&str]) -> Result<()> {
    let lower = format!("/run/.machine{parent}");
    fs::create_dir_all(&lower).with_context(|| format!("make {lower}"))?;
    let none: Option<&str> = None;
    mount(Some(parent), lower.as_str(), none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .with_context(|| format!("bind {parent} to {lower}"))?;
    fresh("tmpfs", parent, Some("mode=755"))?;
    for entry in fs::read_dir(&lower).with_context(|| format!("list {lower}"))? {
        let name = entry.with_context(|| format!("list {lower}"))?.file_name();
        if !own.iter().any(|mine| name == *mine) {
            let link = Path::new(parent).join(&name);
            symlink(Path::new(&lower).join(&name), &link)
                .with_context(|| format!("link {}", link.display()))?;
        }
    }
    for name in own {
        let path = Path::new(parent).join(name);
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("chmod {}", path.display()))?;
    }
    Ok(())
}

/// Copies a directory tree with modes: the disk of a host that died to the one that boots in its place.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
        let entry = entry.with_context(|| format!("list {}", from.display()))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().with_context(|| format!("stat {}", source.display()))?;
        if kind.is_dir() {
            copy_tree(&source, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)
                .with_context(|| format!("copy {} to {}", source.display(), target.display()))?;
        }
    }
    let mode = fs::metadata(from).with_context(|| format!("stat {}", from.display()))?.permissions();
    fs::set_permissions(to, mode).with_context(|| format!("chmod {}", to.display()))
}
