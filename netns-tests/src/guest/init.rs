//! `mesh-lab guest NAME`: the first process of a guest. It mounts, loads the drivers of its two devices, and does what it is
//! told over the serial port.
#![allow(unsafe_code)] // fork, before any thread exists; power off.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, sethostname};
use serde_json::{Value, json};

use super::protocol::{PORT, Reply, Request, What};
use crate::host::write_atomically;

/// How long a unit that ended stays down (systemd's default RestartSec).
const RESTART_AFTER: Duration = Duration::from_millis(100);
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Never returns while the guest runs.
pub fn main(name: &str) -> Result<()> {
    if std::process::id() != 1 {
        bail!("this is for the first process of a guest only");
    }
    // SAFETY: no thread has been started in this process.
    let worker = match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            if let Err(error) = serve(name) {
                eprintln!("mesh-lab guest: {error:#}");
            }
            std::process::exit(1);
        }
        ForkResult::Parent { child } => child,
    };
    // All orphans are ours.
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) if pid == worker => break,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => break,
        }
    }
    // SAFETY: a bare system call; nobody is left who has anything to write.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    Ok(())
}

fn serve(name: &str) -> Result<()> {
    prepare(name)?;
    let port = wait_for_port()?;
    let reader = OpenOptions::new().read(true).write(true).open(&port);
    let reader = reader.with_context(|| format!("open {}", port.display()))?;
    let server = Arc::new(Server {
        port: Mutex::new(reader.try_clone().context("serial port")?),
        units: Mutex::default(),
    });
    server.reply(0, Ok(json!(name)))?;
    for line in BufReader::new(reader).lines() {
        let request: Request = match serde_json::from_str(&line.context("read from the lab")?) {
            Ok(request) => request,
            Err(error) => {
                eprintln!("request: {error}");
                continue;
            }
        };
        let server = Arc::clone(&server);
        std::thread::spawn(move || {
            let result = server.carry_out(request.what).map_err(|error| format!("{error:#}"));
            server.reply(request.id, result).ok();
        });
    }
    Ok(())
}

fn prepare(name: &str) -> Result<()> {
    for directory in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "etc/margay",
        "etc/cni",
        "var/lib/margay",
        "var/lib/cni",
        "var/log/margay",
    ] {
        fs::create_dir_all(Path::new("/").join(directory)).with_context(|| format!("make /{directory}"))?;
    }
    let mounts =
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run"), ("tmpfs", "/tmp")];
    for (kind, at) in mounts.into_iter().chain([("bpf", "/sys/fs/bpf")]) {
        let none: Option<&str> = None;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), none).with_context(|| format!("mount {at}"))?;
    }
    // What udev makes elsewhere.
    for (to, name) in [("", "fd"), ("/0", "stdin"), ("/1", "stdout"), ("/2", "stderr")] {
        let link = Path::new("/dev").join(name);
        std::os::unix::fs::symlink(format!("/proc/self/fd{to}"), &link)
            .with_context(|| format!("link {}", link.display()))?;
    }
    if !Path::new("/var/run").exists() {
        std::os::unix::fs::symlink("/run", "/var/run").context("link /var/run")?;
    }
    sethostname(name).context("host name")?;
    // The serial console of a guest under load must not become its brake.
    fs::write("/proc/sys/kernel/printk", "3").context("quiet the console")?;
    // The node /dev/net/tun comes with its module; everything else loads when it is first asked for.
    command("modprobe", &["-a", "virtio_net", "tun"]).status().context("modprobe")?;
    Ok(())
}

/// The port by its name, once the driver has found it.
fn wait_for_port() -> Result<PathBuf> {
    crate::wait::until("the serial port", Duration::from_secs(60), || {
        for entry in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
            if fs::read_to_string(entry.path().join("name")).unwrap_or_default().trim() == PORT {
                return Ok(Some(Path::new("/dev").join(entry.file_name())));
            }
        }
        Ok(None)
    })
}

fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", PATH).env("HOME", "/").current_dir("/");
    command
}

/// A unit, and the number of times it was started anew.
#[derive(Debug, Default)]
struct Unit {
    pid: Option<i32>,
    restarts: u32,
    wanted: bool,
}

struct Server {
    port: Mutex<File>,
    units: Mutex<BTreeMap<String, Unit>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

impl Server {
    fn reply(&self, id: u64, result: Result<Value, String>) -> Result<()> {
        let mut text = serde_json::to_string(&Reply { id, result }).context("encode reply")?;
        text.push('\n');
        lock(&self.port).write_all(text.as_bytes()).context("write to the lab")
    }

    fn carry_out(self: &Arc<Self>, what: What) -> Result<Value> {
        match what {
            What::Run { argv, env, stdin } => run(&argv, env, &stdin),
            What::Write { path, content } => {
                write_atomically(Path::new(&path), content.as_bytes()).map(|()| Value::Null)
            }
            What::StartUnit { name, argv } => self.start(name, argv),
            What::StopUnit { name } => {
                self.signal(&name, Signal::SIGTERM, true)?;
                crate::wait::until(format!("{name} to end"), Duration::from_secs(10), || {
                    Ok(self.query(&name)?.0.is_none().then_some(Value::Null))
                })
            }
            What::KillUnit { name } => self.signal(&name, Signal::SIGKILL, false).map(|()| Value::Null),
            What::QueryUnit { name } => self.query(&name).map(|state| json!(state)),
        }
    }

    fn query(&self, name: &str) -> Result<(Option<i32>, u32)> {
        let units = lock(&self.units);
        let unit = units.get(name).with_context(|| format!("no unit {name}"))?;
        Ok((unit.pid, unit.restarts))
    }

    fn signal(&self, name: &str, signal: Signal, for_good: bool) -> Result<()> {
        let mut units = lock(&self.units);
        let unit = units.get_mut(name).with_context(|| format!("no unit {name}"))?;
        unit.wanted &= !for_good;
        match unit.pid {
            Some(pid) => kill(Pid::from_raw(pid), signal).with_context(|| format!("signal {name}")),
            None => Ok(()),
        }
    }

    fn start(self: &Arc<Self>, name: String, argv: Vec<String>) -> Result<Value> {
        let (program, arguments) = argv.split_first().context("empty command")?;
        let (program, arguments) = (program.clone(), arguments.to_vec());
        if lock(&self.units).get(&name).is_some_and(|unit| unit.wanted || unit.pid.is_some()) {
            bail!("unit {name} already runs");
        }
        lock(&self.units).insert(name.clone(), Unit { wanted: true, ..Unit::default() });
        let path = format!("/var/log/margay/{name}.log");
        let log = OpenOptions::new().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("open {path}"))?;
        let server = Arc::clone(self);
        std::thread::spawn(move || {
            loop {
                let mut child = command(&program, &[]);
                child.args(&arguments).stdin(Stdio::null());
                let (Ok(out), Ok(err)) = (log.try_clone(), log.try_clone()) else { return };
                let mut units = lock(&server.units);
                let Some(unit) = units.get_mut(&name).filter(|unit| unit.wanted) else { return };
                let child = child.stdout(out).stderr(err).spawn();
                unit.pid = child.as_ref().ok().and_then(|child| i32::try_from(child.id()).ok());
                drop(units);
                match child {
                    Ok(mut child) => drop(child.wait()),
                    Err(error) => eprintln!("{program}: {error}"),
                }
                if let Some(unit) = lock(&server.units).get_mut(&name) {
                    unit.pid = None;
                    if !unit.wanted {
                        return;
                    }
                    unit.restarts += 1;
                }
                std::thread::sleep(RESTART_AFTER);
            }
        });
        Ok(Value::Null)
    }
}

fn run(argv: &[String], env: Vec<(String, String)>, stdin: &str) -> Result<Value> {
    let (program, arguments) = argv.split_first().context("empty command")?;
    let mut command = command(program, &[]);
    command.args(arguments).envs(env).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {program}"))?;
    if let Some(mut input) = child.stdin.take() {
        // Who does not read it does not want it.
        input.write_all(stdin.as_bytes()).ok();
    }
    let output = child.wait_with_output().with_context(|| format!("wait for {program}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(json!([code(output.status), text(&output.stdout), text(&output.stderr)]))
}
