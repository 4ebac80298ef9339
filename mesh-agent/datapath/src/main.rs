//! `mesh-datapath IFNAME`: one userspace WireGuard device, configured over its UAPI socket.

use std::cell::RefCell;
use std::io::IsTerminal as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use anyhow::Context as _;
use clap::Parser;
use mesh_datapath::engine::{self, Engine, Exit};
use mesh_datapath::handover::service::Service;
use mesh_datapath::handover::socket::{self, Inheritance};
use mesh_datapath::offload::{self, Offload};
use mesh_datapath::process::kept::Kept;
use mesh_datapath::process::standby::Standby;
use mesh_datapath::process::supervisor::{self, End, Ready};
use mesh_datapath::process::{daemon, linger, notify, privileges, probe, sandbox, signals};
use mesh_datapath::server::{self, Server, ServerError};
use mesh_datapath::session::Cipher;
use mesh_datapath::tun::{self, Tun, TunError};
use mesh_datapath::udp::Sockets;
use mesh_noise::lanes;
use tracing_subscriber::EnvFilter;

/// A userspace WireGuard device. Configure it with wg(8).
///
/// Goes into the background once its socket, /var/run/wireguard/IFNAME.sock, answers. Ends on SIGTERM or SIGINT,
/// when the interface is deleted, and when the socket's file is removed.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Stays in the foreground
    #[arg(short, long, group = "foreground_or_probe")]
    foreground: bool,
    /// Leaves the interface in place at the end, so that its packets are dropped and take no other route
    #[arg(long)]
    persist: bool,
    /// Starts the device again when it crashes, from a process that keeps interface and configuration
    #[arg(long, requires = "foreground")]
    supervise: bool,
    /// Takes the device over from the process that drives it, with all sessions; starts it if there is none
    #[arg(long)]
    replace: bool,
    /// While the interface is something else, such as kernel WireGuard, waits until it is gone
    #[arg(long, requires = "foreground")]
    standby: bool,
    /// Having passed the device on, stays; takes it up again when nobody drives it any more
    #[arg(long, requires = "supervise")]
    linger: bool,
    /// Puts an empty file there when it is ready
    #[arg(long, value_name = "FILE", requires = "foreground_or_probe")]
    ready_file: Option<PathBuf>,
    /// Only says by its exit code whether the process of --ready-file is ready
    #[arg(long, group = "foreground_or_probe", requires = "ready_file", conflicts_with_all = ["supervise", "replace", "standby", "persist"])]
    probe: bool,
    /// The interface; made if there is none, taken over if its last owner is gone
    #[arg(value_name = "IFNAME")]
    interface: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_log();
    report(run(&arguments))
}

fn report(result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Levels come from RUST_LOG, or from LOG_LEVEL as other userspace devices have it.
fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new(match std::env::var("LOG_LEVEL").as_deref() {
            Ok("verbose" | "debug") => "debug",
            Ok("error") => "error",
            Ok("silent") => "off",
            _ => "info",
        })
    });
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();
}

/// What a device needs that is made once, whoever works on it.
struct Held {
    tun: Tun,
    server: Arc<Server>,
    offload: Offload,
    /// The configuration, for the worker after a crash.
    kept: Option<Kept>,
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let name = &arguments.interface;
    tun::check_name(name)?;
    let path = mesh_uapi::client::socket_path(name);
    if arguments.probe {
        let file = arguments.ready_file.as_deref().unwrap_or(&path);
        return Ok(probe::probe(file, &path).map(|()| ExitCode::SUCCESS)?);
    }
    if let Some(file) = &arguments.ready_file
        && let Err(e) = std::fs::remove_file(file)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        return Err(e).with_context(|| format!("{}", file.display()));
    }
    let offload = offloads()?;
    choose_crypto()?;
    let mut replace = arguments.replace;
    loop {
        match device(arguments, offload, replace) {
            Ok(End::Asked) => return Ok(ExitCode::SUCCESS),
            Ok(End::Failed) => return Ok(ExitCode::FAILURE),
            Ok(End::InOrder) if !arguments.linger => return Ok(ExitCode::SUCCESS),
            Ok(End::InOrder) => {}
            // Somebody was faster than us after the wait; from whom we do not take it.
            Err(e) if !replace && arguments.linger && is_live(&e) => {}
            Err(e) => return Err(e),
        }
        replace = false;
        tracing::info!("{name}: stays, and starts again when nobody drives it");
        if !linger::wait(&path).with_context(|| format!("{}", path.display()))? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn is_live(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ServerError::Live(_)))
}

/// Drives the device once, from whoever has it (`replace`) or from the start.
fn device(arguments: &Arguments, offload: Offload, replace: bool) -> anyhow::Result<End> {
    let name = &arguments.interface;
    let handover = socket::path(name);
    let inheritance = match replace {
        true => socket::ask(&handover).with_context(|| format!("{}", handover.display()))?,
        false => None,
    };
    let path = mesh_uapi::client::socket_path(name);
    let kept = arguments.supervise.then(Kept::new).transpose().context("memfd_create")?;
    let held = match &inheritance {
        Some(Inheritance { tun, listener, .. }) => {
            let tun = Tun::adopt(name, tun.try_clone().context("descriptor of the TUN")?, offload.tun)?;
            let listener = listener.try_clone().context("descriptor of the socket")?;
            Held { tun, server: Arc::new(Server::adopt(&path, listener)?), offload, kept }
        }
        None => {
            server::claim(&path)?;
            let Some(tun) = open_tun(arguments, offload.tun)? else { return Ok(End::Asked) };
            Held { tun, server: Arc::new(Server::bind(&path)?), offload, kept }
        }
    };
    if !arguments.supervise {
        // Being told to is the only end in order that there is without anyone to go on.
        return work(arguments, held, inheritance, None).map(|()| End::Asked);
    }
    privileges::drop_all_but_kept().map_err(anyhow::Error::msg)?;
    let (held, inheritance) = (RefCell::new(Some(held)), RefCell::new(inheritance));
    let work = |ready| {
        // In a process of its own: what it takes stays with its parent.
        let Some(held) = held.take() else { return false };
        work(arguments, held, inheritance.take(), Some(ready))
            .inspect_err(|e| tracing::error!("{e:#}"))
            .is_ok()
    };
    // The first worker has the predecessor's sockets now; open here too, they would take packets nobody reads.
    supervisor::supervise(work, || drop(inheritance.take())).context("fork")
}

/// Attaches to the TUN; `None` when told to end while the interface was something else.
fn open_tun(arguments: &Arguments, offload: bool) -> anyhow::Result<Option<Tun>> {
    let name = &arguments.interface;
    let mut standby: Option<Standby> = None;
    loop {
        match Tun::open(name, offload) {
            Err(TunError::NotTun(_)) if arguments.standby => {}
            outcome => return Ok(Some(outcome?)),
        }
        let Some(standby) = &mut standby else {
            // Then looks once more: it may have gone before there was anyone to tell.
            standby = Some(Standby::begin().context("link events")?);
            tracing::info!("{name}: is no TUN device; standing by until it is gone");
            tell_ready(arguments);
            continue;
        };
        if !standby.wait().context("link events")? {
            return Ok(None);
        }
    }
}

fn tell_ready(arguments: &Arguments) {
    if let Some(file) = &arguments.ready_file
        && let Err(e) = std::fs::write(file, "")
    {
        tracing::warn!("--ready-file {}: {e}", file.display());
    }
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(e) = notify::ready(&socket)
    {
        tracing::warn!("NOTIFY_SOCKET {}: {e}", socket.display());
    }
}

/// All, unless the environment turns some off.
fn offloads() -> anyhow::Result<Offload> {
    let Some(value) = std::env::var_os(offload::VARIABLE) else { return Ok(Offload::ALL) };
    value
        .to_str()
        .and_then(Offload::parse)
        .with_context(|| format!("{}={}: not on, off, tun or udp", offload::VARIABLE, value.display()))
}

/// Bursts are sealed together where the CPU can, unless a bench compares that with the library's way.
fn choose_crypto() -> anyhow::Result<()> {
    match std::env::var_os("MARGAY_CRYPTO") {
        Some(value) if value == "ring" => lanes::Engine::only_ring(),
        Some(value) if value != "lanes" => {
            anyhow::bail!("MARGAY_CRYPTO={}: not lanes or ring", value.display())
        }
        _ => {}
    }
    Ok(())
}

/// ChaCha20-Poly1305, unless a bench wants to know what all the rest costs.
fn cipher() -> Cipher {
    if std::env::var_os("MARGAY_NULL_CRYPTO").is_none_or(|value| value != "1") {
        return Cipher::Sealed;
    }
    tracing::error!("MARGAY_NULL_CRYPTO=1: PACKETS ARE NOT ENCRYPTED. For measuring only");
    Cipher::Null
}

/// Drives the device until it ends, and leaves its socket to whoever goes on.
fn work(
    arguments: &Arguments,
    held: Held,
    inheritance: Option<Inheritance>,
    ready: Option<Ready>,
) -> anyhow::Result<()> {
    let server = held.server.clone();
    let name = &arguments.interface;
    let taken_over = inheritance.is_some();
    let result = drive(arguments, held, inheritance, ready);
    let goes_on = match &result {
        Ok(Exit::HandedOver) => true,
        // The next worker; or the predecessor, if this one did not come to say that it is ready.
        Ok(Exit::Failed(_)) | Err(_) => arguments.supervise || taken_over,
        Ok(_) => false,
    };
    if !goes_on {
        server.remove();
    }
    match result? {
        // As after a crash, the interface stays: its packets must not take another road.
        Exit::Failed(why) => anyhow::bail!("{name}: {why}"),
        Exit::HandedOver => tracing::info!("{name}: another process goes on"),
        exit => tracing::info!("{name}: ends: {exit:?}"),
    }
    Ok(())
}

fn drive(
    arguments: &Arguments,
    held: Held,
    inheritance: Option<Inheritance>,
    ready: Option<Ready>,
) -> anyhow::Result<Exit> {
    let name = arguments.interface.clone();
    let Held { tun, server, offload, kept } = held;
    let inherited = inheritance.is_some();
    let (stream, state, sockets) = match inheritance {
        Some(Inheritance { stream, state, sockets, .. }) => {
            let fwmark = state.as_ref().map_or(0, |state| state.fwmark);
            let sockets = Sockets::adopt(sockets, fwmark, offload.udp).context("UDP sockets")?;
            (Some(stream), state, sockets)
        }
        None => {
            let state = kept.as_ref().map(Kept::read).transpose().context("kept configuration")?.flatten();
            let (port, fwmark) = state.as_ref().map_or((0, 0), |state| (state.port, state.fwmark));
            (None, state, Sockets::bind(port, fwmark, offload.udp).context("UDP sockets")?)
        }
    };
    let engine = Engine::new(tun, sockets, offload, cipher())?;
    if let Some(state) = &state {
        engine.device.import(state, engine::now()).context("the predecessor's state")?;
    } else if inherited {
        tracing::warn!(
            "{name}: the running process told its state in another version; the agent tells us again"
        );
    }
    // Not before: what fails until here leaves an interface that it found, and none that it made.
    engine.tun().set_persistent(true).context("TUNSETPERSIST")?;
    let exit = serve(arguments, &server, &engine, kept, stream, ready)?;
    if !arguments.persist
        && !matches!(exit, Exit::Failed(_) | Exit::HandedOver)
        && let Err(e) = engine.tun().set_persistent(false)
    {
        tracing::debug!("{name}: {e}");
    }
    Ok(exit)
}

/// Runs the engine until it ends.
fn serve(
    arguments: &Arguments,
    server: &Arc<Server>,
    engine: &Arc<Engine>,
    kept: Option<Kept>,
    predecessor: Option<UnixStream>,
    ready: Option<Ready>,
) -> anyhow::Result<Exit> {
    let parent = match arguments.foreground {
        true => None,
        false => {
            let keep_output = ["LOG_LEVEL", "RUST_LOG"].iter().any(|v| std::env::var_os(v).is_some());
            Some(daemon::daemonize(keep_output).context("daemonise")?)
        }
    };
    privileges::drop_all_but_kept().map_err(anyhow::Error::msg)?;
    let (sender, exits) = mpsc::channel();
    signals::watch(sender.clone()).context("signals")?;
    if let Some(stream) = predecessor {
        // Only now does it end, and only now may anything be sealed.
        socket::begin(&stream).context("take over from the running process")?;
    }
    let handover = socket::path(&arguments.interface);
    let service = Arc::new(Service::bind(&handover).with_context(|| format!("{}", handover.display()))?);
    if let Some(kept) = kept {
        engine.set_keeper(Box::new(move |state| kept.write(state)));
    }
    engine.start(&sender).context("threads")?;
    server.start(engine, &sender).context("threads")?;
    service.start(engine, server, &sender).context("threads")?;
    tracing::info!(
        "mesh-datapath {} on {}, UDP port {}, MTU {}",
        env!("CARGO_PKG_VERSION"),
        arguments.interface,
        engine.sockets().port,
        engine.device.mtu()
    );
    if let Some(ready) = ready {
        ready.say();
    }
    if let Some(parent) = parent {
        parent.ready().context("parent")?;
    }
    tell_ready(arguments);
    // Last: letting go of the terminal opens a file.
    sandbox::enter()?;
    let exit = exits.recv().context("every thread is gone");
    service.remove();
    exit
}
