//! mesh-lab: hosts and pods as network namespaces around the real programs.
#![allow(clippy::disallowed_methods)] // The lab is all edge.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use netns_tests::bins::Bins;
use netns_tests::conformance::{case, report, run};
use netns_tests::lab::Lab;
use netns_tests::{bench, control, demo, enter, guest, holder, say, spec};

/// Hosts and pods as network namespaces around the real mesh-agent, mesh-datapath and mesh-cni.
///
/// Each host has its own network, mount, PID and UTS namespace, so /run/margay, /etc/margay, /sys/fs/bpf and so
/// on are its own; the machine's network is never touched. Needs root. The programs are found beside mesh-lab
/// (MARGAY_BIN_DIR says otherwise).
#[derive(Parser)]
#[command(name = "mesh-lab", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring a lab up and leave it so (examples: netns-tests/labs)
    Up {
        /// Lab file
        file: PathBuf,
    },
    /// Run a command in a host or pod of a lab; its exit code is passed through
    Exec {
        /// Which lab, if several are up
        #[arg(long)]
        lab: Option<String>,
        /// node/NAME, ext/NAME or pod/NAMESPACE/NAME
        target: String,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// What is up, and what its agents say
    Status {
        /// Which lab, if several are up
        #[arg(long)]
        lab: Option<String>,
    },
    /// Cut or heal the link between two hosts
    Link {
        /// Which lab, if several are up
        #[arg(long)]
        lab: Option<String>,
        /// One host
        a: String,
        /// The other
        b: String,
        /// cut or heal
        #[arg(value_parser = ["cut", "heal"])]
        what: String,
    },
    /// Cut a host off the carrier of announcements, or heal it
    Carrier {
        /// Which lab, if several are up
        #[arg(long)]
        lab: Option<String>,
        /// The host
        host: String,
        /// cut or heal
        #[arg(value_parser = ["cut", "heal"])]
        what: String,
    },
    /// Take a lab down; nothing is left
    Down {
        /// Which lab, if several are up
        #[arg(long)]
        lab: Option<String>,
    },
    /// Three hosts, six pods: the mesh shown with real packets, in under a minute
    Demo {
        /// Leave it up to play with
        #[arg(long)]
        keep: bool,
        /// The process that keeps it
        #[arg(long, hide = true)]
        keeper: bool,
    },
    /// Replay reachability cases (JSON, plain or gzipped) on real pods; ends "N passed, N failed"
    Conformance {
        /// Case files
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Only cases whose name contains this
        #[arg(long)]
        filter: Option<String>,
        /// One JSON object per case instead of lines for people
        #[arg(long)]
        json: bool,
        /// Files replayed at the same time, each in a lab of its own
        #[arg(long, default_value_t = 2)]
        jobs: usize,
    },
    /// Measure mesh-datapath beside wireguard-go and others (docs/performance.md)
    Bench {
        #[command(flatten)]
        options: bench::Options,
    },
    #[command(hide = true)]
    Holder { name: String },
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        holder: i32,
        #[arg(long)]
        pod: Option<String>,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    #[command(hide = true)]
    Keep { file: PathBuf },
    /// The first process of a virtual machine
    #[command(hide = true)]
    Guest { name: String },
    /// What a virtual machine's share in a test is done with
    #[command(hide = true, subcommand)]
    Here(Here),
}

/// Everything in the network namespace it is called in.
#[derive(Subcommand)]
enum Here {
    /// Waits until this host's agent has carried out what its sources say now
    Enforced,
    /// The agent's metrics
    Metrics,
    /// Answers probes until it is killed
    Listen {
        #[arg(long)]
        name: String,
        #[arg(long)]
        port: u16,
        #[arg(required = true)]
        addresses: Vec<std::net::IpAddr>,
    },
    /// Sends back what comes over TCP until it is killed
    Echo { at: std::net::SocketAddr },
    /// One probe, tried for some seconds
    Probe {
        #[arg(long)]
        listener: String,
        #[arg(long)]
        udp: bool,
        from: std::net::IpAddr,
        to: std::net::SocketAddr,
    },
}

fn here(verb: Here) -> Result<ExitCode> {
    use netns_tests::agent::Agent;
    use netns_tests::netns::Netns;
    use netns_tests::probe::{self, Outcome, Probe};
    use netns_tests::spec::Protocol;
    let netns = Netns::open(std::path::Path::new("/proc/self/ns/net"))?;
    match verb {
        Here::Enforced => Agent::here().enforced(netns_tests::guest::PATIENCE)?,
        Here::Metrics => say!("{}", Agent::metrics()?),
        Here::Listen { name, port, addresses } => {
            let server = probe::server::Server::start()?;
            for address in addresses {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    server.listen(&netns, &name, &name, address, port, protocol)?;
                }
            }
            loop {
                std::thread::park();
            }
        }
        Here::Echo { at } => {
            let listener = std::net::TcpListener::bind(at).with_context(|| format!("listen at {at}"))?;
            for stream in listener.incoming() {
                let mut stream = stream.context("accept")?;
                std::thread::spawn(move || {
                    let mut back = stream.try_clone()?;
                    std::io::copy(&mut stream, &mut back)
                });
            }
        }
        Here::Probe { listener, udp, from, to } => {
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let probe = Probe { from: netns, src: from, dst: to.ip(), port: to.port(), protocol, listener };
            let outcome = probe.persist(probe::PATIENCE);
            say!("{outcome}");
            return Ok(if outcome == Outcome::Allowed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    match act(Cli::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mesh-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Holder { name } => holder::main(&name)?,
        Verb::Guest { name } => guest::init::main(&name)?,
        Verb::Here(verb) => return here(verb),
        Verb::Enter { holder, pod, command } => return code(enter::main(holder, pod.as_deref(), &command)?),
        Verb::Up { file } => {
            let lab = spec::Lab::read(&file)?;
            let text = file.to_string_lossy().into_owned();
            control::detach(&Bins::beside_current()?, &lab.name, &["keep", &text])?;
            say!("lab {} is up: mesh-lab status | exec | link | down", lab.name);
        }
        Verb::Keep { file } => {
            let lab = spec::Lab::read(&file)?;
            control::keep(Lab::up(lab, &Bins::beside_current()?)?)?;
        }
        Verb::Exec { lab, target, command } => return exec(lab.as_deref(), &target, &command),
        Verb::Status { lab } => return status(lab.as_deref()),
        Verb::Link { lab, a, b, what } => {
            let request = control::Request::Link { a, b, cut: what == "cut" };
            control::ask(&control::chosen(lab.as_deref())?, &request)?;
        }
        Verb::Carrier { lab, host, what } => {
            let request = control::Request::Carrier { host, cut: what == "cut" };
            control::ask(&control::chosen(lab.as_deref())?, &request)?;
        }
        Verb::Down { lab } => {
            let name = control::chosen(lab.as_deref())?;
            control::ask(&name, &control::Request::Down)?;
            say!("lab {name} is down");
        }
        Verb::Demo { keep: true, keeper: false } => {
            let name = demo::lab()?.name;
            control::detach(&Bins::beside_current()?, &name, &["demo", "--keep", "--keeper"])?;
        }
        Verb::Demo { keep, .. } => demo::run(&Bins::beside_current()?, keep)?,
        Verb::Bench { options } => bench::run(&options, &Bins::beside_current()?)?,
        Verb::Conformance { files, filter, json, jobs } => {
            return conformance(&files, filter.as_deref(), json, jobs);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn code(code: i32) -> Result<ExitCode> {
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

/// Replaces this process by `mesh-lab enter`, with the lab's paths in its environment.
fn exec(lab: Option<&str>, target: &str, command: &[String]) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    let bins = Bins::beside_current()?;
    let (pid, pod) = control::find(&control::state(&control::chosen(lab)?)?, target)?;
    let mut enter = std::process::Command::new(&bins.lab);
    enter.args(["enter", "--holder", &pid.to_string()]);
    if let Some(pod) = pod {
        enter.args(["--pod", &pod]);
    }
    Err(enter.arg("--").args(command).envs(bins.environment()).exec()).context("enter the host")
}

fn status(lab: Option<&str>) -> Result<ExitCode> {
    let name = control::chosen(lab)?;
    let state = control::state(&name)?;
    say!("lab {name}, kept by process {}", state.owner);
    for host in state.hosts.keys() {
        let pods: Vec<&str> =
            state.pods.iter().filter(|(_, (node, _))| node == host).map(|(pod, _)| pod.as_str()).collect();
        say!("\n{host}: {}", if pods.is_empty() { "no pods".into() } else { pods.join(" ") });
        let bins = Bins::beside_current()?;
        let pid = state.hosts.get(host).map(ToString::to_string).unwrap_or_default();
        let meshctl = std::process::Command::new(&bins.lab)
            .args(["enter", "--holder", &pid, "--", "meshctl", "status"])
            .env("PATH", bins.path())
            .output()
            .context("run meshctl")?;
        let text = if meshctl.status.success() { meshctl.stdout } else { meshctl.stderr };
        String::from_utf8_lossy(&text).lines().for_each(|line| say!("  {line}"));
    }
    Ok(ExitCode::SUCCESS)
}

fn conformance(files: &[PathBuf], filter: Option<&str>, json: bool, jobs: usize) -> Result<ExitCode> {
    let bins = Bins::beside_current()?;
    let mut work = Vec::new();
    for path in files {
        let mut cases = case::read(path)?;
        cases.retain(|case| filter.is_none_or(|part| case.name.contains(part)));
        work.push((path.display().to_string(), cases));
    }
    let work = std::sync::Mutex::new(work.into_iter());
    let results = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, files.len()) {
            scope.spawn(|| {
                loop {
                    let next = work.lock().ok().and_then(|mut work| work.next());
                    let Some((name, cases)) = next else { return };
                    let of_file = run::file(&name, &cases, &bins, &mut |result| match json {
                        true => say!("{}", serde_json::to_string(result).unwrap_or_default()),
                        false => say!("{}", report::line(result)),
                    });
                    if let Ok(mut results) = results.lock() {
                        results.extend(of_file);
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_default();
    let (text, good) = report::closing(&results);
    say!("\n{text}");
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
