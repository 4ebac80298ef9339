//! A host as the lab sees it: start, stop, commands, units and files inside.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::bins::Bins;
use crate::holder::{Reply, Request};
use crate::leaks::MARK;
use crate::mounts::{self, DISK};
use crate::netns::Netns;

/// A host's namespaces and the process that holds them. Dropping it ends the host.
#[derive(Debug)]
pub struct Host {
    name: String,
    bins: Bins,
    /// The init's PID in the lab's PID namespace.
    pid: i32,
    netns: Netns,
    control: Mutex<Option<BufReader<UnixStream>>>,
    holder: Child,
    /// The directories that survive the host, by their names in [`DISK`]: an open descriptor keeps a tmpfs alive.
    disk: Vec<(&'static str, File)>,
}

impl Host {
    /// Makes the namespaces; nothing in the network but a loopback that is up.
    pub fn start(name: &str, bins: &Bins) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("control socket")?;
        let mut holder = Command::new(&bins.lab)
            .args(["holder", name])
            .env(MARK, &bins.run)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null()) // What is wrong comes as a reply.
            .process_group(0) // Ctrl-C is for the lab, which then ends the hosts.
            .spawn()
            .with_context(|| format!("start {}", bins.lab.display()))?;
        let mut control = BufReader::new(ours);
        let started = (|| {
            // The two lines come from two processes, in any order.
            let (mut pid, mut ready) = (None, false);
            loop {
                match read_reply(&mut control)? {
                    Reply::Pid(found) => pid = Some(found),
                    Reply::Ready => ready = true,
                    Reply::Failed(why) => bail!(why),
                    Reply::Unit { .. } => bail!("unexpected reply"),
                }
                if let (Some(pid), true) = (pid, ready) {
                    return Ok(pid);
                }
            }
        })();
        let pid = match started {
            Ok(pid) => pid,
            Err(error) => {
                drop(control);
                holder.wait().ok();
                return Err(error.context(format!("start host {name}")));
            }
        };
        let netns = Netns::open(Path::new(&format!("/proc/{pid}/ns/net")))?;
        let mut disk = Vec::new();
        for directory in DISK {
            let path = format!("/proc/{pid}/root/{directory}");
            disk.push((directory, File::open(&path).with_context(|| format!("open {path}"))?));
        }
        let host = Self {
            name: name.into(),
            bins: bins.clone(),
            pid,
            netns,
            control: Mutex::new(Some(control)),
            holder,
            disk,
        };
        host.netns.ip(&["link set lo up".into()])?;
        Ok(host)
    }

    /// Its name, which is its host name too.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The programs that it runs.
    pub fn bins(&self) -> &Bins {
        &self.bins
    }

    /// PID of its init.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A path inside the host, as the lab reaches it.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.pid))
    }

    /// A command that runs in the host, with its network, files, processes and name.
    pub fn command(&self, argv: &[&str]) -> Command {
        self.enter(None, argv)
    }

    /// A command that runs in a pod of the host: the host's files, the pod's network.
    pub fn pod_command(&self, netns: &str, argv: &[&str]) -> Command {
        self.enter(Some(netns), argv)
    }

    fn enter(&self, pod: Option<&str>, argv: &[&str]) -> Command {
        let mut command = Command::new(&self.bins.lab);
        command.args(["enter", "--holder", &self.pid.to_string()]);
        if let Some(pod) = pod {
            command.args(["--pod", pod]);
        }
        command.arg("--").args(argv);
        command.env(MARK, &self.bins.run).envs(self.bins.environment()).env_remove("RUST_BACKTRACE");
        command
    }

    /// Runs a command in the host to its end; an error carries its output.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        self.run_with(argv, b"")
    }

    /// Runs a command in the host to its end, with this on its standard input.
    pub fn run_with(&self, argv: &[&str], input: &[u8]) -> Result<String> {
        let mut command = self.command(argv);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("run mesh-lab enter")?;
        let stdin = child.stdin.take();
        let output = std::thread::scope(|scope| {
            // One that ends without reading all of it says why by its exit code.
            scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
            child.wait_with_output()
        });
        checked(&format!("{}: {}", self.name, argv.join(" ")), output.context("wait for mesh-lab enter")?)
    }

    fn ask(&self, request: &Request) -> Result<Reply> {
        let mut guard = self.control.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let control = guard.as_mut().with_context(|| format!("host {} is stopped", self.name))?;
        let mut line = serde_json::to_string(request).context("encode request")?;
        line.push('\n');
        control.get_mut().write_all(line.as_bytes()).context("write to the holder")?;
        match read_reply(control)? {
            Reply::Failed(why) => bail!("host {}: {why}", self.name),
            reply => Ok(reply),
        }
    }

    /// Starts a unit: a program that the host's init keeps running. Output: [`Host::log`].
    pub fn start_unit(&self, name: &str, argv: &[&str]) -> Result<()> {
        let argv = argv.iter().map(ToString::to_string).collect();
        self.ask(&Request::Start { name: name.into(), argv, path: self.bins.path() }).map(drop)
    }

    /// Ends a unit for good and waits for its end.
    pub fn stop_unit(&self, name: &str) -> Result<()> {
        self.ask(&Request::Stop { name: name.into(), now: false })?;
        let ended = self.ended(name);
        if ended.is_err() {
            self.ask(&Request::Stop { name: name.into(), now: true })?;
        }
        ended
    }

    /// Ends a unit for good by `kill -9`, for one whose own end takes its time.
    pub fn end_unit(&self, name: &str) -> Result<()> {
        self.ask(&Request::Stop { name: name.into(), now: true })?;
        self.ended(name)
    }

    fn ended(&self, name: &str) -> Result<()> {
        crate::wait::until(format!("{name} to end"), Duration::from_secs(5), || {
            Ok(self.unit(name)?.0.is_none().then_some(()))
        })
    }

    /// `kill -9` of a unit, which the init starts again.
    pub fn kill_unit(&self, name: &str) -> Result<()> {
        self.signal_unit(name, Signal::SIGKILL)
    }

    /// Sends a unit's main process a signal, as `systemctl kill` and `systemctl reload` do.
    pub fn signal_unit(&self, name: &str, signal: Signal) -> Result<()> {
        self.ask(&Request::Kill { name: name.into(), signal: signal as i32 }).map(drop)
    }

    /// PID inside the host of the only child of a unit's main process: what a supervisor watches.
    pub fn child_of_unit(&self, name: &str) -> Result<i32> {
        let (pid, _) = self.unit(name)?;
        let pid = pid.with_context(|| format!("unit {name} is down"))?;
        let children = fs::read_to_string(self.path(&format!("/proc/{pid}/task/{pid}/children")))
            .with_context(|| format!("children of {name}"))?;
        let mut children = children.split_whitespace();
        match (children.next(), children.next()) {
            (Some(child), None) => child.parse().context("process id"),
            _ => bail!("unit {name} has not one child"),
        }
    }

    /// A unit's PID inside the host while it runs, and how often it was started anew.
    pub fn unit(&self, name: &str) -> Result<(Option<i32>, u32)> {
        match self.ask(&Request::Query { name: name.into() })? {
            Reply::Unit { pid, restarts } => Ok((pid, restarts)),
            other => bail!("unexpected reply {other:?}"),
        }
    }

    /// What a unit has written so far.
    pub fn log(&self, unit: &str) -> String {
        fs::read(self.path(&format!("/var/log/margay/{unit}.log")))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Writes a file in the host by temporary name and rename; directories are made.
    pub fn write(&self, inside: &str, content: &[u8]) -> Result<()> {
        write_atomically(&self.path(inside), content).with_context(|| format!("host {}", self.name))
    }

    /// As [`Host::write`], for what only the host's root may read.
    pub fn write_secret(&self, inside: &str, content: &[u8]) -> Result<()> {
        write_as(&self.path(inside), content, 0o600).with_context(|| format!("host {}", self.name))
    }

    /// Takes a file away; not being there is fine.
    pub fn remove(&self, inside: &str) -> Result<()> {
        match fs::remove_file(self.path(inside)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("host {}: remove {inside}", self.name))
            }
            _ => Ok(()),
        }
    }

    /// Ends the host at once, as a power cut would, and waits until nothing of it runs.
    pub fn kill(&mut self) {
        self.control.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        self.holder.wait().ok();
    }

    /// Boots a host in the place of this one, which has been killed: same name, same disk, all else new.
    pub fn reboot(&self) -> Result<Self> {
        let host = Self::start(&self.name, &self.bins)?;
        for (directory, file) in &self.disk {
            let old = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            mounts::copy_tree(&old, &host.path(&format!("/{directory}")))?;
        }
        Ok(host)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
    }
}

fn read_reply(control: &mut BufReader<UnixStream>) -> Result<Reply> {
    let mut line = String::new();
    if control.read_line(&mut line).context("read from the holder")? == 0 {
        bail!("the holder has ended");
    }
    serde_json::from_str(&line).with_context(|| format!("holder said {line:?}"))
}

/// Output of a command that must succeed.
pub fn checked(what: &str, output: Output) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{what}: {}: {}{}", output.status, text.trim(), errors.trim());
    }
    Ok(text)
}

/// Temporary dot-name beside it, then rename: a watcher sees the whole file or none.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    write_as(path, content, 0o644)
}

fn write_as(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let directory = path.parent().context("path has no directory")?;
    let name = path.file_name().context("path has no file name")?.to_string_lossy();
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    let temporary = directory.join(format!(".{name}.tmp"));
    let written = (|| {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(content)
    })();
    written.with_context(|| format!("write {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("rename to {}", path.display()))
}

/// Identity and age of a file, for seeing whether it was replaced.
pub fn stamp(path: &Path) -> Option<(u64, i64, i64)> {
    let meta = fs::metadata(path).ok()?;
    Some((meta.ino(), meta.mtime(), meta.mtime_nsec()))
}
