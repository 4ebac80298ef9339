//! `mesh-cni install` and `uninstall`: the plugin and its configuration onto a host and off it again.
//!
//! A container runtime may look, and call the plugin, at any moment, and the installer may be killed at any: every
//! file is there as it was or as it is to be. The plugin comes first and the configuration that names it last, and the
//! other way round when they go. What another CNI put there is never changed or removed.

mod conflist;
mod disk;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use conflist::Conflist;
use disk::Disk;

/// The plugin's name in both directories.
const PLUGIN: &str = "mesh-cni";
/// By this a plugin on the disk is known as ours, whatever its version.
const BINARY_MARK: &[u8] = b"mesh-cni, the CNI plugin of Margay (margay.io/mesh-cni)";

/// The CNI plugin of Margay. Container runtimes call it without arguments.
#[derive(Debug, Parser)]
#[command(name = "mesh-cni", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put plugin and configuration in place; again after an upgrade
    Install(Install),
    /// Take away what `install` put there, and nothing else
    Uninstall(Directories),
}

#[derive(Debug, Clone, clap::Args)]
struct Directories {
    /// Where the runtime looks for plugins
    #[arg(long, default_value = "/opt/cni/bin", value_name = "DIR")]
    bin_dir: PathBuf,
    /// Where the runtime looks for configurations
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "DIR")]
    conf_dir: PathBuf,
}

#[derive(Debug, Clone, clap::Args)]
struct Install {
    #[command(flatten)]
    directories: Directories,
    /// The configuration; it keeps its file name
    #[arg(long, value_name = "FILE", required_unless_present = "chained", conflicts_with = "chained")]
    conflist: Option<PathBuf>,
    /// Instead: another CNI's configuration in the directory, which mesh-cni is chained behind, in a list of our own
    /// that sorts before it
    #[arg(long, value_name = "NAME")]
    chained: Option<PathBuf>,
}

/// Runs the command on the command line.
pub(crate) fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match &arguments.command {
        Command::Install(install) => run_install(install),
        Command::Uninstall(directories) => uninstall(&mut Disk::default(), directories),
    };
    match outcome {
        Ok(done) => {
            done.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("mesh-cni: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_install(install: &Install) -> anyhow::Result<Vec<String>> {
    let own = std::env::current_exe().context("/proc/self/exe")?;
    let plugin = std::fs::read(&own).with_context(|| format!("{}", own.display()))?;
    put(&mut Disk::default(), install, &plugin)
}

/// The configuration to install, under its name.
fn wanted(install: &Install) -> anyhow::Result<Conflist> {
    match (&install.conflist, &install.chained) {
        (Some(file), _) => Conflist::own(file),
        (None, Some(name)) => {
            if name.components().count() != 1 || name.file_name().is_none() {
                bail!("--chained: {} is not the name of a file in --conf-dir", name.display());
            }
            Conflist::chained(&install.directories.conf_dir.join(name))
        }
        (None, None) => bail!("neither --conflist nor --chained"),
    }
}

fn put(disk: &mut Disk<'_>, install: &Install, plugin: &[u8]) -> anyhow::Result<Vec<String>> {
    let Directories { bin_dir, conf_dir } = &install.directories;
    let _lock = disk::lock(conf_dir)?;
    let wanted = wanted(install)?;
    for other in wanted.plugins().filter(|other| *other != PLUGIN) {
        // Else every pod of the node would fail, one by one.
        let path = bin_dir.join(other);
        if !path.exists() {
            bail!("{}: has the plugin {other:?}, which is not in {}", wanted.name, bin_dir.display());
        }
    }
    let binary = bin_dir.join(PLUGIN);
    refuse_foreign(&binary, is_our_binary)?;
    let conf = conf_dir.join(&wanted.name);
    refuse_foreign(&conf, conflist::is_ours)?;

    let mut done = vec![disk.put(&binary, plugin, 0o755)?, disk.put(&conf, &wanted.bytes, 0o644)?];
    // Under another name by an earlier version, or before it was chained.
    for path in conflist::ours_in(conf_dir)?.into_iter().filter(|path| *path != conf) {
        done.push(disk.remove(&path)?);
    }
    if let Some(other) = conflist::first_before(conf_dir, &wanted.name)? {
        done.push(format!("note: {} sorts before {}, so runtimes take that one", other, wanted.name));
    }
    Ok(done)
}

fn uninstall(disk: &mut Disk<'_>, directories: &Directories) -> anyhow::Result<Vec<String>> {
    let Directories { bin_dir, conf_dir } = directories;
    let mut done = Vec::new();
    let mut still_named = Vec::new();
    if conf_dir.is_dir() {
        let _lock = disk::lock(conf_dir)?;
        for path in conflist::ours_in(conf_dir)? {
            done.push(disk.remove(&path)?);
        }
        done.extend(disk.sweep(conf_dir)?);
        still_named = conflist::naming(conf_dir, PLUGIN)?;
    }
    let binary = bin_dir.join(PLUGIN);
    if bin_dir.is_dir() {
        done.extend(disk.sweep(bin_dir)?);
    }
    match std::fs::read(&binary) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("{}", binary.display())),
        Ok(_) if !still_named.is_empty() => {
            done.push(format!("kept {}: {} names it", binary.display(), still_named.join(", ")));
        }
        Ok(bytes) if is_our_binary(&bytes) => done.push(disk.remove(&binary)?),
        Ok(_) => done.push(format!("kept {}: it is not ours", binary.display())),
    }
    Ok(done)
}

fn is_our_binary(bytes: &[u8]) -> bool {
    bytes.windows(BINARY_MARK.len()).any(|window| window == BINARY_MARK)
}

/// An error if `path` is there and somebody else's.
fn refuse_foreign(path: &Path, is_ours: impl Fn(&[u8]) -> bool) -> anyhow::Result<()> {
    match std::fs::read(path) {
        Ok(bytes) if is_ours(&bytes) => Ok(()),
        Ok(_) => bail!("{}: was not put there by `mesh-cni install`; remove or rename it", path.display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("{}", path.display())),
    }
}
