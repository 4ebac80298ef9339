//! A virtual machine as one more host of a lab: Debian's kernel in QEMU, for what this machine's kernel has not (WireGuard).
//!
//! ```text
//!   host k (namespaces)                     QEMU (TCG), a process of host k
//!   ┌──────────────────────┐               ┌───────────────────────────────┐
//!   │ eth0 ─ bridge ─ tap0 ═══════════════════ eth0   mesh-agent, pods …   │
//!   │ /run/guest.sock ════════ virtio-serial ═══ mesh-lab guest (init)     │
//!   │ /etc/margay/manifests  ◀─ copied ─▶      /etc/margay/manifests       │
//!   └──────────────────────┘               └───────────────────────────────┘
//! ```
//!
//! The lab's host of the same name is only the cable and the disk: it has no address and runs nothing of the mesh. QEMU is in
//! its PID namespace, so the guest ends with the host, whatever ends that.

pub mod image;
pub mod init;
pub mod protocol;
mod sync;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_api::defaults::{CONFIG, DEVICE, MANIFESTS};
use mesh_api::status::Status;
use serde_json::{Value, json};

use crate::host::Host;
use crate::lab::Lab;
use crate::pods::{conflist, netns_name};
use crate::wait;
use crate::wire::Wire;
use protocol::{Reply, Request, What};
use sync::Sync;

/// A boot takes about six seconds, and twenty times that on a machine that builds at the same time.
const BOOT: Duration = Duration::from_secs(300);
/// Any command in the guest that is not said to take long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running guest; ends when dropped, and with its host.
#[derive(Debug)]
pub struct Guest {
    name: String,
    line: Arc<Line>,
    // Before the rest: it talks to the guest.
    sync: Option<Sync>,
}

/// The end of a command in the guest.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Exit code; 128 + n when signal n ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A command under way in the guest.
#[derive(Debug)]
pub struct Running {
    what: String,
    reply: Receiver<Result<Value, String>>,
}

/// The serial line: requests go out, replies come back in any order.
#[derive(Debug)]
struct Line {
    stream: Mutex<UnixStream>,
    waiting: Mutex<BTreeMap<u64, Sender<Result<Value, String>>>>,
    next: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    /// Boots a guest behind a host that is plugged into the wire, with the same name.
    pub fn boot(host: &Host, initramfs: &[u8]) -> Result<Self> {
        let kernel = image::kernel()?;
        // The cable itself is silent.
        for scope in ["all", "default"] {
            host.netns().sysctl(&format!("ipv6/conf/{scope}/disable_ipv6"), "1")?;
        }
        host.netns().ip(&[
            "link add guest0 type bridge mcast_snooping 0 stp_state 0".into(),
            "tuntap add tap0 mode tap".into(),
            "link set tap0 master guest0 up".into(),
            "link set eth0 master guest0 up".into(),
            "link set guest0 up".into(),
        ])?;
        std::fs::write(host.path("/run/initramfs"), initramfs).context("write the initramfs")?;
        let argv = qemu(host.name(), &kernel);
        host.start_unit("qemu", &argv.iter().map(String::as_str).collect::<Vec<_>>())?;
        let log = || host.log("qemu");
        let socket = host.path("/run/guest.sock");
        let stream = wait::until("QEMU's socket", BOOT, || Ok(Some(UnixStream::connect(&socket)?)))
            .with_context(log)?;
        let line = Arc::new(Line {
            stream: Mutex::new(stream.try_clone().context("serial line")?),
            waiting: Mutex::default(),
            next: AtomicU64::new(1),
        });
        let (ready, booted) = channel();
        lock(&line.waiting).insert(0, ready);
        let of_thread = Arc::clone(&line);
        std::thread::Builder::new()
            .name("guest".into())
            .spawn(move || listen(&of_thread, stream))
            .context("start a thread")?;
        match booted.recv_timeout(BOOT) {
            Ok(Ok(_)) => {}
            other => bail!("guest {} does not boot ({other:?}): {}", host.name(), log()),
        }
        Ok(Self { name: host.name().into(), line, sync: None })
    }

    /// Its name, and that of the host it is behind.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn ask(&self, what: What, said: &str) -> Result<Running> {
        let (sender, reply) = channel();
        let id = self.line.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.line.waiting).insert(id, sender);
        let mut text = serde_json::to_string(&Request { id, what }).context("encode request")?;
        text.push('\n');
        lock(&self.line.stream).write_all(text.as_bytes()).context("write to the guest")?;
        Ok(Running { what: format!("guest {}: {said}", self.name), reply })
    }

    /// Starts a command in the guest.
    pub fn start(&self, argv: &[&str]) -> Result<Running> {
        self.start_with(argv, &[], "")
    }

    fn start_with(&self, argv: &[&str], env: &[(&str, String)], stdin: &str) -> Result<Running> {
        let what = What::Run {
            argv: argv.iter().map(ToString::to_string).collect(),
            env: env.iter().map(|(name, value)| (name.to_string(), value.clone())).collect(),
            stdin: stdin.into(),
        };
        self.ask(what, &argv.join(" "))
    }

    /// Runs a command in the guest to its end; an error carries its output.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        self.start(argv)?.success(PATIENCE)
    }

    /// Runs a command in a pod of the guest.
    pub fn run_in(&self, pod: &str, argv: &[&str]) -> Result<String> {
        self.run(&[&["ip", "netns", "exec", pod], argv].concat())
    }

    /// Starts a unit: a program that is kept running, as on any host of a lab.
    pub fn start_unit(&self, name: &str, argv: &[&str]) -> Result<()> {
        let argv = argv.iter().map(ToString::to_string).collect();
        self.ask(What::StartUnit { name: name.into(), argv }, name)?.value(PATIENCE).map(drop)
    }

    /// Ends a unit for good and waits for its end.
    pub fn stop_unit(&self, name: &str) -> Result<()> {
        self.ask(What::StopUnit { name: name.into() }, name)?.value(PATIENCE).map(drop)
    }

    /// `kill -9` of a unit, which is started again.
    pub fn kill_unit(&self, name: &str) -> Result<()> {
        self.ask(What::KillUnit { name: name.into() }, name)?.value(PATIENCE).map(drop)
    }

    /// A unit's PID while it runs, and how often it was started anew.
    pub fn unit(&self, name: &str) -> Result<(Option<i32>, u32)> {
        let value = self.ask(What::QueryUnit { name: name.into() }, name)?.value(PATIENCE)?;
        serde_json::from_value(value).context("state of a unit")
    }

    /// Writes a file in the guest by temporary name and rename.
    pub fn write(&self, path: &str, content: &str) -> Result<()> {
        let what = What::Write { path: path.into(), content: content.into() };
        self.ask(what, path)?.value(PATIENCE).map(drop)
    }

    /// A file's text.
    pub fn read(&self, path: &str) -> Result<String> {
        self.run(&["cat", path])
    }

    /// What a unit has written so far.
    pub fn log(&self, unit: &str) -> String {
        self.read(&format!("/var/log/margay/{unit}.log")).unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Makes it a node of the lab: addresses, files, datapath and agent. `config` is its agent.yaml without the name.
    pub fn start_mesh(&mut self, lab: &Lab, config: &str) -> Result<()> {
        let own = lab.ips(&self.name)?;
        let mut lines = vec!["link set lo up".to_string()];
        lines.extend(Wire::addressing("eth0", &own, &lab.underlay_ips_but(&self.name), true));
        self.start_with(&["ip", "-batch", "-"], &[], &format!("{}\n", lines.join("\n")))?
            .success(PATIENCE)?;
        self.write("/etc/cni/net.d/10-margay.conflist", &conflist().to_string())?;
        self.sync = Some(Sync::start(&self.name, lab.host(&self.name)?.path(MANIFESTS), self.twin())?);
        self.start_unit(
            "mesh-datapath",
            &["mesh-datapath", "-f", "--supervise", "--persist", "--standby", DEVICE],
        )?;
        self.configure(config)?;
        self.start_unit("mesh-agent", &["mesh-agent"])
    }

    /// Writes its agent.yaml; the agent reads it when it starts.
    pub fn configure(&self, config: &str) -> Result<()> {
        self.write(CONFIG, &format!("nodeName: {}\n{config}\n", self.name))
    }

    /// The same guest for another thread.
    fn twin(&self) -> Self {
        Self { name: self.name.clone(), line: Arc::clone(&self.line), sync: None }
    }

    /// The agent's status, as `meshctl` has it.
    pub fn status(&self) -> Result<Status> {
        let text = self.run(&["meshctl", "status", "-o", "json"])?;
        serde_json::from_str(&text).context("status of the guest's agent")
    }

    /// Waits until its agent knows all its peers and has carried out everything; `kind` is its datapath's.
    pub fn settle(&self, peers: usize, kind: &str, limit: Duration) -> Result<Status> {
        wait::until(format!("guest {} to settle", self.name), limit, || {
            let status = self.status()?;
            let generation = status.generation;
            let device = status.devices.iter().find(|device| device.name == DEVICE);
            if device.is_some_and(|device| device.state == "up" && device.kind == kind)
                && status.peers.len() == peers
                && generation.snapshot > 0
                && generation.enforced >= generation.snapshot
                && status.reconcilers.iter().all(|reconciler| reconciler.state == "done")
            {
                return Ok(Some(status));
            }
            bail!("{:?}, {device:?}, {} peers, {:?}", generation, status.peers.len(), status.issues)
        })
        .with_context(|| {
            format!("mesh-agent: {}\nmesh-datapath: {}", self.log("mesh-agent"), self.log("mesh-datapath"))
        })
    }

    /// Makes a pod in the guest by CNI, as a runtime would: its addresses.
    pub fn add_pod(&self, namespace: &str, name: &str) -> Result<Vec<IpAddr>> {
        let id = netns_name(namespace, name);
        self.run(&["ip", "netns", "add", &id])?;
        let mut config = conflist()["plugins"][0].clone();
        config["cniVersion"] = json!("1.1.0");
        config["name"] = json!("margay");
        let arguments = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}");
        let env = [
            ("CNI_COMMAND", "ADD".to_string()),
            ("CNI_CONTAINERID", id.clone()),
            ("CNI_NETNS", format!("/run/netns/{id}")),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_ARGS", arguments),
            ("CNI_PATH", "/usr/bin".into()),
        ];
        let result = self.start_with(&["mesh-cni"], &env, &config.to_string())?.success(PATIENCE)?;
        let result: Value = serde_json::from_str(&result).context("result of CNI ADD")?;
        let addresses = result["ips"].as_array().into_iter().flatten();
        let ips = addresses.map(|entry| {
            let net: ipnet::IpNet = entry["address"].as_str().unwrap_or_default().parse()?;
            Ok(net.addr())
        });
        ips.collect::<Result<_>>().context("addresses of CNI ADD")
    }
}

impl Running {
    fn value(self, limit: Duration) -> Result<Value> {
        match self.reply.recv_timeout(limit) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(why)) => bail!("{}: {why}", self.what),
            Err(RecvTimeoutError::Timeout) => bail!("{}: no answer in {limit:?}", self.what),
            Err(RecvTimeoutError::Disconnected) => bail!("{}: the guest has ended", self.what),
        }
    }

    /// Waits for the end.
    pub fn end(self, limit: Duration) -> Result<Ended> {
        let (code, stdout, stderr) =
            serde_json::from_value(self.value(limit)?).context("end of a command")?;
        Ok(Ended { code, stdout, stderr })
    }

    /// Waits for the end, which must be a success.
    pub fn success(self, limit: Duration) -> Result<String> {
        let what = self.what.clone();
        let Ended { code, stdout, stderr } = self.end(limit)?;
        if code != 0 {
            bail!("{what}: exit code {code}: {}{}", stdout.trim(), stderr.trim());
        }
        Ok(stdout)
    }
}

fn qemu(name: &str, kernel: &std::path::Path) -> Vec<String> {
    let kernel = kernel.display();
    let command = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check rdinit=/usr/bin/mesh-lab -- guest {name}"
    );
    let options = [
        "qemu-system-x86_64 -M q35 -nodefaults -no-user-config -no-reboot -display none",
        "-accel tcg,thread=multi -cpu max -smp 2 -m 1024 -serial stdio",
        &format!("-kernel {kernel} -initrd /run/initramfs"),
        "-netdev tap,id=net,ifname=tap0,script=no,downscript=no -device virtio-net-pci,netdev=net,romfile=",
        "-chardev socket,id=line,path=/run/guest.sock,server=on,wait=off",
        "-device virtio-serial-pci -device virtserialport,chardev=line,name=margay.lab",
    ];
    let mut argv: Vec<String> = options.iter().flat_map(|line| line.split(' ')).map(String::from).collect();
    argv.extend(["-append".to_string(), command]);
    argv
}

/// Hands replies to those who wait, until the guest ends.
fn listen(line: &Line, stream: UnixStream) {
    for text in BufReader::new(stream).lines() {
        let Ok(text) = text else { break };
        let Ok(Reply { id, result }) = serde_json::from_str(&text) else { continue };
        if let Some(waiting) = lock(&line.waiting).remove(&id) {
            waiting.send(result).ok();
        }
    }
    lock(&line.waiting).clear();
}

/// The loud way out for a machine where no guest can run: `MARGAY_SKIP_GUEST=1`.
pub fn skipped() -> bool {
    let skip = std::env::var_os("MARGAY_SKIP_GUEST").is_some_and(|value| value == "1");
    if skip {
        eprintln!("MARGAY_SKIP_GUEST=1: NOTHING IS TESTED ON KERNEL WIREGUARD");
    }
    skip
}

/// Where `.ci/peers` keeps the guest's kernel.
pub fn directory() -> PathBuf {
    crate::bins::cache().join("guest")
}
