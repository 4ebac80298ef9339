//! `mesh-datapath IFNAME`: one userspace WireGuard device, configured over its UAPI socket.

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use anyhow::Context as _;
use clap::Parser;
use mesh_datapath::engine::{Engine, Exit};
use mesh_datapath::offload::{self, Offload};
use mesh_datapath::process::{daemon, notify, privileges, signals};
use mesh_datapath::server::{self, Server};
use mesh_datapath::session::Cipher;
use mesh_datapath::tun::{self, Tun};
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
    #[arg(short, long)]
    foreground: bool,
    /// Leaves the interface in place at the end, so that its packets are dropped and take no other route
    #[arg(long)]
    persist: bool,
    /// The interface; made if there is none, taken over if its last owner is gone
    #[arg(value_name = "IFNAME")]
    interface: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_log();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
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

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let name = &arguments.interface;
    tun::check_name(name)?;
    let path = mesh_uapi::client::socket_path(name);
    server::claim(&path)?;
    let offload = offloads()?;
    choose_crypto()?;
    let tun = Tun::open(name, offload.tun)?;
    let sockets = Sockets::bind(0, 0, offload.udp).context("UDP sockets")?;
    let engine = Engine::new(tun, sockets, offload, cipher())?;
    match serve(arguments, &path, &engine)? {
        // As after a crash, the interface stays: its packets must not take another road.
        Exit::Failed(why) => anyhow::bail!("{name}: {why}"),
        exit => tracing::info!("{name}: ends: {exit:?}"),
    }
    if !arguments.persist
        && let Err(e) = engine.tun().set_persistent(false)
    {
        tracing::debug!("{name}: {e}");
    }
    Ok(())
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

/// Runs the engine until it ends.
fn serve(arguments: &Arguments, path: &Path, engine: &Arc<Engine>) -> anyhow::Result<Exit> {
    let server = Arc::new(Server::bind(path)?);
    // Not before: what fails until here leaves an interface that it found, and none that it made.
    engine.tun().set_persistent(true).context("TUNSETPERSIST")?;
    let exit = (|| {
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
        engine.start(&sender).context("threads")?;
        server.start(engine, &sender).context("threads")?;
        tracing::info!(
            "mesh-datapath {} on {}, UDP port {}, MTU {}",
            env!("CARGO_PKG_VERSION"),
            arguments.interface,
            engine.sockets().port,
            engine.device.mtu()
        );
        if let Some(parent) = parent {
            parent.ready().context("parent")?;
        }
        if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
            && let Err(e) = notify::ready(&socket)
        {
            tracing::warn!("NOTIFY_SOCKET {}: {e}", socket.display());
        }
        exits.recv().context("every thread is gone")
    })();
    server.remove();
    exit
}
