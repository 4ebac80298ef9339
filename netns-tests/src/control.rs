//! Labs that stay up: a process that owns the lab, its state under /run/mesh-lab/NAME, and a socket there.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::bins::Bins;
use crate::lab::Lab;
use crate::pods::netns_name;
use crate::wait;

const ROOT: &str = "/run/mesh-lab";
/// The line on which the process that starts a lab stops listening to the one that keeps it.
pub const READY: &str = "mesh-lab: ready";

/// What other calls of mesh-lab need to know of a lab.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The process that owns it.
    pub owner: u32,
    /// Hosts and the PIDs of their inits.
    pub hosts: BTreeMap<String, i32>,
    /// `namespace/name` of pods, with host and network namespace (none for a host-network pod).
    pub pods: BTreeMap<String, (String, Option<String>)>,
}

/// A wish to a lab that is up.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// End it.
    Down,
    /// Cut or heal the link between two hosts.
    Link {
        /// One host.
        a: String,
        /// The other.
        b: String,
        /// Cut it.
        cut: bool,
    },
    /// Cut a host off the carrier of announcements, or let it take part.
    Carrier {
        /// The host.
        host: String,
        /// Cut it.
        cut: bool,
    },
}

fn directory(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// Starts `mesh-lab ARGUMENTS…` as a process of its own that keeps a lab, and passes on what it prints until
/// it is ready.
pub fn detach(bins: &Bins, name: &str, arguments: &[&str]) -> Result<()> {
    claim(name)?;
    let mut keeper = Command::new(&bins.lab)
        .args(arguments)
        .current_dir(std::env::current_dir().context("current directory")?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .process_group(0)
        .spawn()
        .context("start the lab's process")?;
    let output = keeper.stdout.take().context("output of the lab's process")?;
    for line in BufReader::new(output).lines() {
        let line = line.context("read from the lab's process")?;
        if line == READY {
            return Ok(());
        }
        crate::say!("{line}");
    }
    let status = keeper.wait().context("wait for the lab's process")?;
    remove(name);
    bail!("the lab is not up ({status})")
}

/// Makes sure that no lab of that name is up; what a dead one left is removed.
fn claim(name: &str) -> Result<()> {
    let directory = directory(name);
    if UnixStream::connect(directory.join("lab.sock")).is_ok() {
        bail!("lab {name} is up already (mesh-lab down --lab {name})");
    }
    remove(name);
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("chmod {}", directory.display()))
}

fn remove(name: &str) {
    fs::remove_dir_all(directory(name)).ok();
    fs::remove_dir(ROOT).ok(); // Unless another lab is there.
}

/// Keeps a lab until somebody wants it down. Prints [`READY`] when others can reach it.
pub fn keep(mut lab: Lab) -> Result<()> {
    let name = lab.spec().name.clone();
    let socket = directory(&name).join("lab.sock");
    let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    write_state(&lab)?;
    crate::say!("{READY}");
    detach_output()?;
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).ok();
        let answer = match serde_json::from_str::<Request>(&line) {
            Ok(Request::Down) => {
                drop(lab);
                remove(&name);
                say(&stream, "ok");
                return Ok(());
            }
            Ok(request) => act(&mut lab, request),
            Err(error) => Err(error.into()),
        };
        match answer {
            Ok(()) => say(&stream, "ok"),
            Err(error) => say(&stream, &format!("{error:#}")),
        }
    }
    Ok(())
}

/// From here on nobody reads what this process prints.
fn detach_output() -> Result<()> {
    let null = fs::OpenOptions::new().write(true).open("/dev/null").context("open /dev/null")?;
    nix::unistd::dup2_stdout(&null).context("detach output")?;
    nix::unistd::dup2_stderr(&null).context("detach output")?;
    nix::unistd::setsid().ok();
    Ok(())
}

fn say(mut stream: &UnixStream, line: &str) {
    stream.write_all(format!("{line}\n").as_bytes()).ok();
}

fn act(lab: &mut Lab, request: Request) -> Result<()> {
    match request {
        Request::Down => Ok(()),
        Request::Link { a, b, cut } => {
            lab.host(&a)?;
            lab.host(&b)?;
            lab.wire_mut().cut(&a, &b, cut)
        }
        Request::Carrier { host, cut } => {
            lab.host(&host)?;
            lab.carrier().cut(&host, cut);
            Ok(())
        }
    }
}

fn write_state(lab: &Lab) -> Result<()> {
    let mut hosts = BTreeMap::new();
    for name in lab.host_names() {
        let pid = lab.host(&name)?.pid();
        hosts.insert(name, pid);
    }
    let pods = lab
        .pods()
        .map(|pod| {
            let spec = &pod.spec;
            let netns = (!spec.host_network).then(|| netns_name(&spec.namespace, &spec.name));
            (format!("{}/{}", spec.namespace, spec.name), (spec.node.clone(), netns))
        })
        .collect();
    let state = State { owner: std::process::id(), hosts, pods };
    let path = directory(&lab.spec().name).join("state.json");
    crate::host::write_atomically(&path, &serde_json::to_vec_pretty(&state)?)
}

/// Names of the labs there are, up or left by a dead process.
pub fn labs() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(ROOT)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The lab that is meant: the named one, or the only one.
pub fn chosen(name: Option<&str>) -> Result<String> {
    match (name, labs().as_slice()) {
        (Some(name), labs) if labs.iter().any(|lab| lab == name) => Ok(name.into()),
        (Some(name), _) => bail!("no lab {name} is up"),
        (None, [one]) => Ok(one.clone()),
        (None, []) => bail!("no lab is up"),
        (None, many) => bail!("which one? --lab {}", many.join(" | ")),
    }
}

/// The state of a lab whose owner lives; what a dead one left is removed.
pub fn state(name: &str) -> Result<State> {
    let directory = directory(name);
    if UnixStream::connect(directory.join("lab.sock")).is_err() {
        // Connecting without a word makes a living owner answer an error to nobody, which is fine.
        remove(name);
        bail!("lab {name} is gone: its process ended, and everything in it with it");
    }
    let path = directory.join("state.json");
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

/// Sends a wish to a lab and waits until it is carried out.
pub fn ask(name: &str, request: &Request) -> Result<()> {
    let owner = state(name)?.owner;
    let mut stream = UnixStream::connect(directory(name).join("lab.sock")).context("reach the lab")?;
    stream.write_all(format!("{}\n", serde_json::to_string(request)?).as_bytes()).context("ask the lab")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("hear from the lab")?;
    if answer.trim() != "ok" {
        bail!("{}", answer.trim());
    }
    if matches!(request, Request::Down) {
        wait::until("the lab's process to end", Duration::from_secs(10), || {
            Ok((!Path::new(&format!("/proc/{owner}")).exists()).then_some(()))
        })?;
    }
    Ok(())
}

/// PID and pod namespace of `node/N`, `ext/N` or `pod/NAMESPACE/NAME`.
pub fn find(state: &State, target: &str) -> Result<(i32, Option<String>)> {
    let host = |name: &str| state.hosts.get(name).copied().with_context(|| format!("no host {name}"));
    let parts: Vec<&str> = target.split('/').collect();
    match parts.as_slice() {
        ["node" | "ext", name] => Ok((host(name)?, None)),
        ["pod", namespace, name] => {
            let key = format!("{namespace}/{name}");
            let (node, netns) = state.pods.get(&key).with_context(|| format!("no pod {key}"))?;
            Ok((host(node)?, netns.clone()))
        }
        _ => bail!("{target:?} is neither node/NAME, ext/NAME nor pod/NAMESPACE/NAME"),
    }
}
