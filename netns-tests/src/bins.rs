//! Where the programs under test are.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The directory of built programs, and the lab's own executable (re-executed as holder and `enter`).
#[derive(Debug, Clone)]
pub struct Bins {
    /// mesh-lab itself.
    pub lab: PathBuf,
    /// Directory of mesh-agent, mesh-datapath, mesh-cni and meshctl.
    pub dir: PathBuf,
    /// Marks everything that this run of the lab starts (see [`crate::leaks`]).
    pub run: String,
}

impl Bins {
    /// For the mesh-lab binary: the programs are beside it unless MARGAY_BIN_DIR says otherwise.
    pub fn beside_current() -> Result<Self> {
        Self::beside(&std::env::current_exe().context("find own executable")?)
    }

    /// The programs beside the given mesh-lab, or in MARGAY_BIN_DIR.
    pub fn beside(lab: &Path) -> Result<Self> {
        let dir = match std::env::var_os("MARGAY_BIN_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => lab.parent().map(Path::to_path_buf).context("own executable has no directory")?,
        };
        let run = format!("{}-{:08x}", std::process::id(), rand::random::<u32>());
        Ok(Self { lab: lab.to_path_buf(), dir, run })
    }

    /// A program, or a clear word that it is not built.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if !path.is_file() {
            bail!("{} is not there: build the workspace first (cargo build --release)", path.display());
        }
        Ok(path)
    }

    /// A program of Kubernetes: from the folder that KUBEBUILDER_ASSETS names, else the one that `.ci/peers` built.
    pub fn kubernetes(&self, name: &str) -> Result<PathBuf> {
        let assets = kubebuilder_assets();
        let (dir, word) = match &assets {
            // Those who provide such a folder have no kube-proxy in it.
            Some(dir) if name != "kube-proxy" || dir.join(name).is_file() => {
                (dir.clone(), "KUBEBUILDER_ASSETS lacks it")
            }
            _ => (peers_dir(), "run .ci/peers"),
        };
        let path = dir.join(name);
        if !path.is_file() {
            bail!("{} is not there: {word}", path.display());
        }
        Ok(path)
    }

    /// PATH inside a host: the built programs, Kubernetes' and the cache of peers' tools, then the machine's.
    pub fn path(&self) -> String {
        let rest = std::env::var("PATH").unwrap_or_default();
        let assets = kubebuilder_assets().map(|dir| format!("{}:", dir.display())).unwrap_or_default();
        format!("{}:{assets}{}:{rest}:/usr/sbin:/sbin", self.dir.display(), peers_dir().display())
    }

    /// What a command in a host finds in its environment: where programs are, and files that are the host's own.
    pub fn environment(&self) -> [(&'static str, OsString); 5] {
        [
            ("PATH", self.path().into()),
            ("CNI_PATH", self.dir.clone().into()),
            ("NETCONFPATH", "/etc/cni/net.d".into()),
            ("KUBECONFIG", crate::cluster::ADMIN_CONFIG.into()),
            ("KUBECACHEDIR", "/run/kubectl".into()),
        ]
    }
}

/// The folder of ready programs that envtest knows by this name.
fn kubebuilder_assets() -> Option<PathBuf> {
    std::env::var_os("KUBEBUILDER_ASSETS").filter(|dir| !dir.is_empty()).map(PathBuf::from)
}

/// Where heavy artefacts are kept between runs (`MARGAY_CACHE`).
pub fn cache() -> PathBuf {
    std::env::var_os("MARGAY_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/margay")
    })
}

/// Where tools built from other projects for interop tests are kept (`.ci/peers`).
pub fn peers_dir() -> PathBuf {
    cache().join("bin")
}
