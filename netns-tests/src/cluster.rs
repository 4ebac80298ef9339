//! Kubernetes on a host of the lab: the real API server over etcd, as units of that host. Nobody runs what objects wish (no
//! scheduler, controllers, kubelets); whoever tests says what they would have said.

mod client;
mod pki;
mod proxy;

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

pub use client::{Client, MANAGER};

use crate::host::Host;
use crate::{http, wait};

/// The administrator's kubeconfig, on the API server's host and wherever [`Cluster::admit`] put it.
pub const ADMIN_CONFIG: &str = "/etc/kubernetes/admin.conf";
/// Port of the API server.
pub const PORT: u16 = 6443;
/// Service addresses.
pub const SERVICES: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
/// Longest time from the start of its programs until the API server is ready, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// The units, in the order of their start.
pub const UNITS: [&str; 3] = ["etcd", "kube-apiserver", "kubectl-proxy"];

const PKI: &str = "/etc/kubernetes/pki";
const ETCD: &str = "http://127.0.0.1:2379";
const SOCKET: &str = "/run/kubectl-proxy.sock";

/// The API server that runs, or will, on a host. All it knows is on that host.
#[derive(Debug, Clone)]
pub struct Cluster<'h> {
    host: &'h Host,
    addresses: Vec<IpAddr>,
}

impl<'h> Cluster<'h> {
    /// Starts an empty cluster on a host that has these addresses, and waits until it is ready.
    pub fn start(host: &'h Host, addresses: &[IpAddr]) -> Result<Self> {
        let cluster = Self::of(host, addresses);
        pki::make(host, addresses)?;
        cluster.admit(host)?;
        cluster.resume()?;
        Ok(cluster)
    }

    /// The cluster that was started on this host.
    pub fn of(host: &'h Host, addresses: &[IpAddr]) -> Self {
        Self { host, addresses: addresses.to_vec() }
    }

    /// Where it is reached.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// The host it is on.
    pub fn host(&self) -> &'h Host {
        self.host
    }

    /// Starts what [`Cluster::stop`] ended, with the same data, and waits until it is ready.
    pub fn resume(&self) -> Result<()> {
        self.start_etcd()?;
        self.start_apiserver()?;
        self.wait_ready()
    }

    /// Ends all programs at once; the data stays.
    pub fn stop(&self) -> Result<()> {
        UNITS.iter().rev().try_for_each(|unit| self.host.end_unit(unit))
    }

    /// Starts the API server anew, and has etcd forget the past: whoever watches from an old version hears 410.
    pub fn restart_compacted(&self) -> Result<()> {
        self.host.end_unit("kube-apiserver")?;
        // An empty range tells the current revision.
        let now = self.etcd("/v3/kv/range", &json!({"key": STANDARD.encode("/")}))?;
        let revision = &now["header"]["revision"];
        if !revision.is_string() {
            bail!("etcd says {now}");
        }
        self.etcd("/v3/kv/compaction", &json!({"revision": revision, "physical": true}))?;
        self.start_apiserver()?;
        self.wait_ready()
    }

    /// Requests to it with the administrator's rights.
    pub fn client(&self) -> Client {
        Client { socket: self.host.path(SOCKET) }
    }

    /// Whether it is ready, or why not.
    pub fn ready(&self) -> Result<()> {
        self.client().ready()
    }

    fn wait_ready(&self) -> Result<()> {
        let client = self.client();
        wait::until("the API server", PATIENCE, || client.ready().map(Some)).with_context(|| self.logs())
    }

    /// Ends of its programs' logs, for the reader of an error.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for unit in UNITS {
            let log = self.host.log(unit);
            let lines: Vec<&str> = log.lines().collect();
            let end = lines.get(lines.len().saturating_sub(15)..).unwrap_or_default();
            text += &format!("last lines of {unit} on {}:\n  {}\n", self.host.name(), end.join("\n  "));
        }
        text
    }

    fn start_unit(&self, unit: &str, program: &Path, arguments: &[String]) -> Result<()> {
        let program = program.to_string_lossy();
        let mut argv: Vec<&str> = vec![&program];
        argv.extend(arguments.iter().map(String::as_str));
        self.host.start_unit(unit, &argv)
    }

    fn start_etcd(&self) -> Result<()> {
        let arguments = [
            "--name=lab".into(),
            "--data-dir=/var/lib/etcd/data".into(),
            format!("--listen-client-urls={ETCD}"),
            format!("--advertise-client-urls={ETCD}"),
            "--listen-peer-urls=http://127.0.0.1:2380".into(),
            "--initial-advertise-peer-urls=http://127.0.0.1:2380".into(),
            "--initial-cluster=lab=http://127.0.0.1:2380".into(),
            "--log-level=warn".into(),
            // Its disk is memory.
            "--unsafe-no-fsync".into(),
        ];
        self.start_unit("etcd", &self.host.bins().kubernetes("etcd")?, &arguments)
    }

    fn start_apiserver(&self) -> Result<()> {
        let first = self.addresses.first().context("an API server needs an address")?;
        let mut services = SERVICES;
        if first.is_ipv6() {
            services.reverse(); // The service `kubernetes` is of the advertised address's family.
        }
        let arguments = [
            format!("--etcd-servers={ETCD}"),
            "--bind-address=::".into(),
            format!("--secure-port={PORT}"),
            format!("--advertise-address={first}"),
            format!("--tls-cert-file={PKI}/apiserver.crt"),
            format!("--tls-private-key-file={PKI}/apiserver.key"),
            format!("--token-auth-file={PKI}/tokens.csv"),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={PKI}/sa.pub"),
            format!("--service-account-signing-key-file={PKI}/sa.key"),
            format!("--service-cluster-ip-range={}", services.join(",")),
            "--authorization-mode=Node,RBAC".into(),
            // It would wait for accounts that no controller makes.
            "--disable-admission-plugins=ServiceAccount".into(),
            "--allow-privileged=true".into(),
            "--profiling=false".into(),
        ];
        self.start_unit("kube-apiserver", &self.host.bins().kubernetes("kube-apiserver")?, &arguments)?;
        if self.host.unit("kubectl-proxy").is_ok_and(|(pid, _)| pid.is_some()) {
            return Ok(());
        }
        self.host.remove(SOCKET)?;
        let proxy =
            ["proxy".into(), format!("--kubeconfig={ADMIN_CONFIG}"), format!("--unix-socket={SOCKET}")];
        self.start_unit("kubectl-proxy", &self.host.bins().kubernetes("kubectl")?, &proxy)
    }

    /// Asks etcd's JSON gateway.
    fn etcd(&self, path: &str, body: &Value) -> Result<Value> {
        let at: SocketAddr = ETCD.trim_start_matches("http://").parse().context("address of etcd")?;
        let body = body.to_string();
        let answer = self.host.netns().run(|| {
            let mut stream = TcpStream::connect(at).context("connect to etcd")?;
            http::exchange(&mut stream, "POST", path, Some(("application/json", body.as_bytes())))
        })??;
        let answer = answer.good().with_context(|| format!("etcd: {path}"))?;
        serde_json::from_slice(&answer).with_context(|| format!("etcd: {path}"))
    }
}

/// What people and tests do with it.
impl Cluster<'_> {
    /// kubectl, as the administrator; what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.host.run(&[&["kubectl"], arguments].concat())
    }

    /// Server-side apply of manifests (YAML or JSON) by kubectl.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        let argv =
            ["kubectl", "apply", "--server-side", "--force-conflicts", "--field-manager", MANAGER, "-f", "-"];
        self.host.run_with(&argv, manifests.as_bytes())
    }

    /// An object by kind (as kubectl knows it), namespace (none for what has none) and name.
    pub fn get(&self, kind: &str, namespace: Option<&str>, name: &str) -> Result<Value> {
        let text = self.on(&["get", kind, name, "-o", "json"], namespace)?;
        serde_json::from_str(&text).with_context(|| format!("{kind} {name}"))
    }

    /// A merge patch: what is null goes.
    pub fn patch(&self, kind: &str, namespace: Option<&str>, name: &str, patch: &Value) -> Result<()> {
        self.on(&["patch", kind, name, "--type=merge", "-p", &patch.to_string()], namespace).map(drop)
    }

    /// A merge patch of an object's status, as a kubelet or controller sets it.
    pub fn set_status(&self, kind: &str, namespace: Option<&str>, name: &str, status: &Value) -> Result<()> {
        let patch = json!({ "status": status }).to_string();
        let arguments = ["patch", kind, name, "--subresource=status", "--type=merge", "-p", &patch];
        self.on(&arguments, namespace).map(drop)
    }

    fn on(&self, arguments: &[&str], namespace: Option<&str>) -> Result<String> {
        let namespace = namespace.map(|name| ["-n", name]);
        self.kubectl(&[arguments, namespace.as_ref().map(<[_; 2]>::as_slice).unwrap_or_default()].concat())
    }

    /// A token of a service account by TokenRequest, bound to a pod of its namespace or to nothing.
    pub fn token(&self, namespace: &str, account: &str, pod: Option<&str>) -> Result<String> {
        let client = self.client();
        let mut spec = json!({"expirationSeconds": 24 * 3600});
        if let Some(pod) = pod {
            let pod = client.ask("GET", &format!("/api/v1/namespaces/{namespace}/pods/{pod}"), None)?;
            let (name, uid) = (&pod["metadata"]["name"], &pod["metadata"]["uid"]);
            spec["boundObjectRef"] = json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid});
        }
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec});
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let answer = client.ask("POST", &path, Some(("application/json", &request)))?;
        answer["status"]["token"].as_str().map(String::from).context("TokenRequest gave no token")
    }

    /// A kubeconfig that reaches it at this address of its with a token.
    pub fn kubeconfig(&self, token: &str, at: IpAddr) -> Result<String> {
        let path = self.host.path(&format!("{PKI}/ca.crt"));
        let authority = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let (server, authority) = (SocketAddr::new(at, PORT), STANDARD.encode(authority));
        Ok(format!(
            "apiVersion: v1
kind: Config
clusters:
- name: lab
  cluster:
    server: https://{server}
    certificate-authority-data: {authority}
users:
- name: user
  user:
    token: {token}
contexts:
- name: lab
  context:
    cluster: lab
    user: user
current-context: lab
"
        ))
    }

    /// Writes a kubeconfig with a token to a host, readable by its root alone.
    pub fn kubeconfig_for(&self, token: &str, to: &Host, path: &str) -> Result<()> {
        let at = self.addresses.first().context("an API server needs an address")?;
        to.write_secret(path, self.kubeconfig(token, *at)?.as_bytes())
    }

    /// Makes the administrator of a host the cluster's: kubectl works there as it does here.
    pub fn admit(&self, host: &Host) -> Result<()> {
        let path = self.host.path(&format!("{PKI}/tokens.csv"));
        let tokens = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let token = tokens.split(',').next().unwrap_or_default();
        self.kubeconfig_for(token, host, ADMIN_CONFIG)
    }
}
