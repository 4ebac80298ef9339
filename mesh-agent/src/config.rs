//! The agent's own configuration file, `/etc/margay/agent.yaml`: what differs between hosts. What the whole
//! mesh shares is in [`mesh`].

pub mod ipam;
pub mod kubernetes;
pub mod mesh;
pub mod node_status;
pub mod reference;
pub mod rotation;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use mesh_api::defaults;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::names;
use crate::source::manifest;
use kubernetes::KubernetesConfig;

/// How log lines look on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Who carries the node's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DatapathChoice {
    /// The kernel where it has WireGuard, else userspace.
    #[default]
    Auto,
    /// WireGuard in the kernel.
    Kernel,
    /// mesh-datapath.
    Userspace,
}

/// `/etc/margay/agent.yaml`. Every field may be left out; unknown ones are refused.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentConfig {
    /// Name of this host's Node object; the environment's NODE_NAME, else the host's name in lower case, unless given.
    #[serde(default)]
    pub node_name: String,
    /// Directory of manifests to follow.
    #[serde(default = "manifests_dir")]
    pub manifests: PathBuf,
    /// The API server to follow in place of the directory; `{}` for that of the cluster whose pod the agent is.
    #[serde(default)]
    pub kubernetes: Option<KubernetesConfig>,
    /// Where keys, the IPAM journal and the memory of admitted nodes are kept.
    #[serde(default = "state_dir")]
    pub state_dir: PathBuf,
    /// What carries packets: WireGuard in the kernel, or mesh-datapath in user space; `auto` takes the kernel's where it has one.
    #[serde(default)]
    pub datapath: DatapathChoice,
    /// Where the sockets are.
    #[serde(default = "run_dir")]
    pub run_dir: PathBuf,
    /// Where metrics and health are served.
    #[serde(default = "metrics_address")]
    #[schemars(with = "String")]
    pub metrics_address: SocketAddr,
    /// How log lines look.
    #[serde(default)]
    pub log_format: LogFormat,
    /// Pod prefixes to announce, at most one a family; believed only where the Node object names none.
    #[serde(default, rename = "podCIDRs")]
    #[schemars(with = "Vec<String>")]
    pub pod_cidrs: Vec<IpNet>,
    /// Where peers can reach this node, best first; its own addresses and the mesh's port unless given. The port is
    /// that of the device `margay0`; `margay1` is reached at the next one.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub endpoints: Vec<SocketAddr>,
    /// File of the secret that preshared keys are made from, the same on every node, mode 0600; read again when it
    /// changes. None for no preshared keys.
    #[serde(default)]
    pub preshared_key_file: Option<PathBuf>,
}

fn manifests_dir() -> PathBuf {
    defaults::MANIFESTS.into()
}

fn state_dir() -> PathBuf {
    defaults::STATE_DIR.into()
}

fn run_dir() -> PathBuf {
    defaults::RUN_DIR.into()
}

fn metrics_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9475))
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is there and cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not YAML, an unknown field, or a value of the wrong type.
    #[error("{path}:{line}: {problem}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// From 1; 0 when there is none.
        line: u64,
        /// Names the field.
        problem: String,
    },
    /// A value that cannot be.
    #[error("{path}: {field}: {problem}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What is wrong with its value.
        problem: String,
    },
}

impl AgentConfig {
    /// Reads `path`; a file that is not there means the defaults. `hostname` is the node's name, used in
    /// lower case where the file gives no `nodeName`.
    pub fn load_with(path: &Path, hostname: &str) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text, hostname),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::parse(path, "", hostname),
            Err(source) => Err(ConfigError::Read { path: path.into(), source }),
        }
    }

    /// [`Self::load_with`] with the name that a pod's environment gives, else this host's.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        #[allow(clippy::disallowed_methods)] // The edge: here configuration enters.
        if let Some(name) = std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty()) {
            return Self::load_with(path, &name);
        }
        // The kernel's name of this UTS namespace, as uname(2) gives it.
        let source: &Path = Path::new("/proc/sys/kernel/hostname");
        let hostname = std::fs::read_to_string(source)
            .map_err(|error| ConfigError::Read { path: source.into(), source: error })?;
        Self::load_with(path, hostname.trim())
    }

    fn parse(path: &Path, text: &str, hostname: &str) -> Result<Self, ConfigError> {
        // A file of nothing but comments is a null document, not a map.
        let blank = text.lines().all(|line| {
            let line = line.trim();
            line.is_empty() || line.starts_with('#') || line == "---"
        });
        let text = if blank { "{}" } else { text };
        let options = serde_saphyr::options! { with_snippet: false };
        let mut config: Self =
            serde_saphyr::from_str_with_options(text, options).map_err(|error| ConfigError::Parse {
                path: path.into(),
                line: manifest::line_of(&error),
                problem: manifest::one_line(&manifest::without_place(&error)),
            })?;
        if config.node_name.is_empty() {
            config.node_name = hostname.to_lowercase();
        }
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let invalid =
            |field, problem: String| Err(ConfigError::Invalid { path: path.into(), field, problem });
        if !names::is_dns_subdomain(&self.node_name) {
            return invalid("nodeName", format!("{:?} is not a DNS-1123 subdomain", self.node_name));
        }
        for (field, value) in
            [("manifests", &self.manifests), ("stateDir", &self.state_dir), ("runDir", &self.run_dir)]
        {
            if !value.is_absolute() {
                return invalid(field, format!("{} is not an absolute path", value.display()));
            }
        }
        let kubeconfig = self.kubernetes.as_ref().and_then(|kubernetes| kubernetes.kubeconfig.as_ref());
        if let Some(path) = kubeconfig.filter(|path| !path.is_absolute()) {
            return invalid("kubernetes.kubeconfig", format!("{} is not an absolute path", path.display()));
        }
        if let Some(path) = self.preshared_key_file.as_ref().filter(|path| !path.is_absolute()) {
            return invalid("presharedKeyFile", format!("{} is not an absolute path", path.display()));
        }
        for (index, prefix) in self.pod_cidrs.iter().enumerate() {
            if prefix.trunc() != *prefix {
                return invalid("podCIDRs", format!("{prefix} has host bits, meant is {}", prefix.trunc()));
            }
            if self.pod_cidrs[..index].iter().any(|other| other.addr().is_ipv4() == prefix.addr().is_ipv4()) {
                return invalid("podCIDRs", format!("{prefix} is a second prefix of its family"));
            }
        }
        for endpoint in &self.endpoints {
            let ip = endpoint.ip();
            if endpoint.port() == 0 || ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() {
                return invalid("endpoints", format!("nobody can reach {endpoint}"));
            }
            if endpoint.port() == u16::MAX {
                return invalid("endpoints", format!("{endpoint} leaves no port for the second device"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<AgentConfig, String> {
        AgentConfig::parse(Path::new("agent.yaml"), text, "Host-A").map_err(|error| error.to_string())
    }

    #[test]
    fn a_missing_or_empty_file_means_the_defaults() {
        let missing = AgentConfig::load_with(Path::new("/nonexistent/agent.yaml"), "Host-A").unwrap();
        assert_eq!(missing, parse("# nothing\n---\n\n").unwrap());
        assert_eq!(missing.node_name, "host-a");
        assert_eq!(missing.manifests, Path::new(defaults::MANIFESTS));
        assert_eq!(missing.metrics_address.to_string(), defaults::METRICS_ADDRESS);
    }

    #[test]
    fn every_field_is_read() {
        let config = parse(
            "nodeName: n1\nmanifests: /m\nstateDir: /s\nrunDir: /r\nmetricsAddress: '[::1]:1'\n\
             logFormat: json\ndatapath: kernel\npodCIDRs: [10.1.0.0/24, 'fd00:1::/64']\nendpoints: ['192.0.2.1:51820']\n\
             presharedKeyFile: /etc/margay/secret\nkubernetes: {kubeconfig: /etc/margay/kubeconfig}\n",
        )
        .unwrap();
        assert_eq!(config.node_name, "n1");
        assert_eq!((config.log_format, config.datapath), (LogFormat::Json, DatapathChoice::Kernel));
        assert_eq!(config.pod_cidrs.len(), 2);
        let kubeconfig = config.kubernetes.clone().unwrap().kubeconfig;
        assert_eq!(kubeconfig, Some("/etc/margay/kubeconfig".into()));
        assert_eq!(config.endpoints, vec!["192.0.2.1:51820".parse().unwrap()]);
    }

    #[test]
    fn errors_name_file_line_and_field() {
        for (text, expected) in [
            ("nodeName: n1\nnodename: n2\n", "agent.yaml:2: unknown field `nodename`"),
            ("nodeName: Big\n", "agent.yaml: nodeName: \"Big\" is not a DNS-1123 subdomain"),
            ("manifests: m\n", "agent.yaml: manifests: m is not an absolute path"),
            ("\n\nmetricsAddress: here\n", "agent.yaml:3:"),
            ("podCIDRs: [10.0.0.1/24]\n", "agent.yaml: podCIDRs: 10.0.0.1/24 has host bits"),
            ("podCIDRs: [10.0.0.0/24, 10.0.1.0/24]\n", "second prefix of its family"),
            ("endpoints: ['0.0.0.0:1']\n", "agent.yaml: endpoints: nobody can reach"),
            ("endpoints: ['192.0.2.1:65535']\n", "leaves no port"),
            ("presharedKeyFile: secret\n", "agent.yaml: presharedKeyFile: secret is not an absolute path"),
            ("kubernetes: {kubeconfig: here}\n", "kubernetes.kubeconfig: here is not an absolute path"),
            ("kubernetes: {server: here}\n", "agent.yaml:1: unknown field `server`"),
            ("logFormat: xml\n", "agent.yaml:1:"),
            ("datapath: ebpf\n", "agent.yaml:1:"),
            ("nodeName: [\n", "agent.yaml:"),
            ("- a\n", "agent.yaml:1:"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }
}
