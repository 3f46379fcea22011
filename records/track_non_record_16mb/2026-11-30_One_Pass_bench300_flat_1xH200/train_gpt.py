"Stable Growing Recurrence: a GPT that grows by re-applying its core while it trains.\n\n    stem -> core, core, ... -> tail      1 pass, then more as the run proceeds\n\nOne run trains for a fixed wall clock, averages the weights, quantizes them to int6 and compresses\nthem so that code and model fit 16,000,000 bytes. Then it reloads the file and scores the validation\ntext in bits per byte: plain, with sliding windows, and with score-first test-time training.\n\n    torchrun --standalone --nproc_per_node=8 train_gpt.py        one node of 8 GPUs, 600 s\n    python train_gpt.py                                          one process, GPU or CPU\n    python train_gpt.py --env scripts/demo.env                   the settings of a file\n    python train_gpt.py --evaluate logs/RUN.int6.xz              score an artifact again\n    python train_gpt.py --run-id RUN --resume                    go on from RUN's last checkpoint\n\nEvery setting is a flag (--residual-scale-init) and an environment variable (RESIDUAL_SCALE_INIT);\na flag wins over a variable, and a variable over --env's file. Exit codes: 0 done, 1 any other\nfailure, 2 a mistake in what was given, 3 diverged, 4 stopped by a signal with a checkpoint,\n5 stopped by a signal but exported and scored.\n"
from __future__ import annotations
Ar=FloatingPointError
Aq=RecursionError
Ap=RuntimeError
Ao=KeyError
An=ImportError
w=staticmethod
v=print
u=sorted
n=set
m=isinstance
h=ValueError
d=slice
b=property
S=OSError
R=getattr
Q=zip
L=min
E=max
D=len
import argparse as o,bisect,difflib,fcntl as x,hashlib as i,io,json as y,lzma as e,math as H,os as V,shutil,signal as N,sys as T,tempfile as As,time as M
from collections.abc import Callable as At,Mapping,Sequence
from contextlib import suppress as p
from dataclasses import dataclass as Au,field,fields as j,replace as z
from datetime import timedelta as Av
from functools import cache as A0,partial as O,wraps
from itertools import zip_longest as Aw
from pathlib import Path as K
from typing import Any as f,Literal,NamedTuple as g,get_args as Ax,get_type_hints as Ay
from urllib.parse import quote
if __name__=='__main__'and N.getsignal(N.SIGINT)!=N.SIG_IGN:N.signal(N.SIGINT,N.SIG_DFL)
try:import numpy as F,sentencepiece as AC,torch as A,torch.distributed as U,torch.nn.functional as J;from torch import Tensor as C,library,nn as W;from torch.nn.attention import SDPBackend as q,sdpa_kernel as Az
except An as A_:T.exit(f"error: {A_.name} is not installed: run pip install -r requirements.txt")
try:import triton,triton.language as tl;from triton.tools.tensor_descriptor import TensorDescriptor as B0
except An:triton=None
B1,B2,AD,B3=2,3,4,5
class P(h):0
def G(rule_holds,text):
	if not rule_holds:raise P(text)
def A1(*B):A=[B for(A,B)in B if not A];G(not A,'\n'.join(A))
def B(default,text,least=0,group=''):return field(default=default,metadata={'text':text,'least':least,'group':group})
@A0
def A2(text:str)->tuple[tuple[float,int],...]:
	with p(h):
		B=[A.split(':')for A in text.split(',')];A,C=[float(A)for(A,B)in B],[int(A)for(B,A)in B]
		if A[0]==0 and A==u({*A})and A[-1]<1<=L(C):return tuple(Q(A,C,strict=True))
	return()
@Au(frozen=True)
class X:
	run_id:str|None=B(None,'name of log and artifact; none: time and seed',group='run');seed:int=B(1337,'seed of the weights and of the data order');output_dir:str=B('logs','folder of the log, the artifact and the checkpoints');iterations:int|None=B(None,'steps after which training ends; none: no limit');max_wallclock_seconds:float|None=B(6e2,'seconds of training; none: no limit',.001);warmup_steps:int=B(20,'steps before the clock starts, undone before it does');train_log_every:int=B(50,'steps between lines of the log',1);val_loss_every:int|None=B(None,'steps between validations; none: at the end',1);checkpoint_seconds:float|None=B(None,'seconds between checkpoints; none: off',.001);resume:bool=B(False,'go on from the newest checkpoint of run_id, if there is one');on_signal:Literal['export','checkpoint']=B('export','at SIGTERM, SIGINT or SIGHUP');dtype:Literal['auto','bfloat16','float32']=B('auto','auto: bfloat16 where it is native');compile:Literal['auto','on','off']=B('auto','torch.compile; auto: on a GPU only');data_path:str=B('data/datasets/fineweb10B_sp1024','folder of the shards',group='data');tokenizer_path:str|None=B(None,"none: data_path's tokenizer.model, or FineWeb's");train_batch_tokens:int=B(786432,'tokens of a step; not set: 98,304 a process',1);micro_batch_tokens:int=B(98304,'most tokens that a rank takes at once',1);seq_len_schedule:str=B('0.0:4,0.3:2,0.6:1','start:parts that windows are cut into, ...');tokenizer_sha256:str|None=B(None,'hash it must have; none: its own',group='model');vocab_size:int|None=B(None,"pieces; none: the tokenizer's",8);train_seq_len:int=B(2048,'tokens of a window, in training and evaluation',8);num_layers:int=B(11,'unique layers',1);model_dim:int=B(512,'width of the residual stream',1);num_heads:int=B(4,'query heads; heads of 128 dims are faster than of 64',1);num_kv_heads:int=B(2,'key and value heads',1);mlp_mult:float=B(3.,'MLP width over model width');rope_dims:int=B(32,'dims of each head that RoPE turns');qk_gain_init:float=B(1.5,'start of the gain of each query head',-H.inf);xsa_last_n:int=B(4,"last layers with XSA (never the core's)");bigram_vocab_size:int=B(512,'rows of BigramHash; 0: off');bigram_dim:int=B(32,"width of BigramHash's rows",1);ve_dim:int=B(128,'width of the value embedding table',1);ve_layers:str=B('9,10','layers with value embeddings; none: off');logit_softcap:float=B(3e1,'bound of the logits',.001);tied_embed_init_std:float=B(.005,'std of the embedding at the start');core_start:int=B(4,'first layer of the core',group='recurrence');core_end:int=B(7,"layer after the core's last",1);passes_schedule:str=B('0.0:1,0.6:2,0.85:3','start:passes, ...; starts are fractions');num_passes:int|None=B(None,"fixed passes in training; none: the schedule's",1);eval_passes:int|None=B(None,'passes in evaluation; none: as training ended',1);residual_scale_init:float=B(1.,"start of each later pass's scale",-H.inf);feedback_mode:Literal['none','diagonal']=B('none',"diagonal: c = d * U(V'h)");feedback_rank:int=B(2,'columns of U and V',1);jacobian_proxy_weight:float=B(.01,'weight of the proxy in the loss');matrix_lr:float=B(.025,"Muon's learning rate",group='optimization');tied_embed_lr:float=B(.035,"AdamW's learning rate of the tables");scalar_lr:float=B(.025,"AdamW's learning rate of all else");muon_momentum:float=B(.99,"Muon's momentum");muon_momentum_warmup_start:float=B(.92,"Muon's first momentum");muon_momentum_warmup_frac:float=B(.237,'rise of momentum (1,500 of 6,330 steps)',1e-09);muon_momentum_frac:float=B(.0158,'most that it averages (100 of 6,330 steps)',1e-09);muon_wd:float=B(.2,'cautious weight decay of the banks, times lr scale squared');adam_wd:float=B(.04,'decoupled weight decay of tables and projections');beta1:float=B(.9,"AdamW's first decay");beta2:float=B(.95,"AdamW's second decay");grad_clip_norm:float=B(.3,"bound of the global gradient's norm");warmdown_frac:float=B(.55,'last fraction, in which the lr falls to 0',1e-09);weight_average:Literal['none','ema','swa','ema_swa']=B('ema','of weights',group='end');ema_frac:float=B(.0526,"EMA's horizon (decay 0.997 in 6,330 steps)",1e-09);swa_frac:float=B(.0079,"fraction between SWA's samples (50 of 6,330 steps)");swa_lr_scale:float=B(.2,'SWA starts below this lr scale');late_qat_threshold:float=B(.15,"the core's QAT starts below this lr scale; 0: never");evaluate:str|None=B(None,'score this artifact, do not train',group='evaluation');artifact_limit_bytes:int=B(16000000,'most bytes of code and model together',1);eval_wallclock_seconds:float|None=B(6e2,'TTT skips training to end within this');eval_stride:int=B(64,'tokens that a sliding window scores',1);eval_batch_seqs:int=B(64,'windows that a rank scores at once',1);sliding_eval:bool=B(True,'score with sliding windows');ttt_enabled:bool=B(True,'score with score-first test-time training');ttt_lr:float=B(.002,"SGD's learning rate for the first chunk");ttt_epochs:int=B(3,'epochs over each chunk once it is scored');ttt_chunk_tokens:int=B(32768,'tokens of a chunk',1);ttt_batch_seqs:int=B(32,'most sequences of an SGD step, all ranks together',1);token_losses:str|None=B(None,"write the last evaluation's losses here (.npy, nats)")
	def __post_init__(A):
		M=[]
		for F in j(A):G,N=R(A,F.name),F.metadata['least'];X=not m(G,int|float)or N<=G<H.inf;M.append((X,f"{F.name}={G} must be a finite number of at least {N}"))
		A1(*M);B,C,O,P=A.train_seq_len,A.num_layers,A.head_dim,A.max_passes;Q,I,S,J=A.model_dim,A.num_heads,A.num_kv_heads,A.train_batch_tokens;T,U,L=A.core_start,A.core_end,A.ve_layer_ids;Y=D(n(L))==D(L)and all(0<=A<C for A in L);V=A2(A.seq_len_schedule);Z=f"seq_len_schedule={A.seq_len_schedule}";a=f"parts divide train_seq_len={B} (0.0:1 cuts nothing)";b=A.iterations is None and A.max_wallclock_seconds is None;W='starts rise from 0 and are below 1';A1((not b,'iterations, max_wallclock_seconds: set one, or training never ends'),(K(A.run_id or'x').name==(A.run_id or'x'),'run_id: no folders, a name'),(bool(A.run_id)or not A.resume,'resume: name the run that goes on, --run-id'),(J%B==0,f"train_batch_tokens={J}: use {E(1,J//B)*B}"),(A.micro_batch_tokens>=B,f"micro_batch_tokens: must hold a window of {B} tokens"),(B<=1<<20,f"train_seq_len={B} must be at most {1<<20}"),((A.vocab_size or 0)<=65536,'vocab_size: token ids are 16 bits wide'),(T<U<=C,f"core_start={T}, core_end={U}: no part of the {C} layers"),(A.mlp_dim>=1,f"mlp_mult={A.mlp_mult} leaves no MLP: raise it"),(Q%I==I%S==0,f"model_dim={Q}, num_heads={I}, num_kv_heads={S} must divide"),(A.rope_dims%2==0 and A.rope_dims<=O,f"rope_dims: even and up to {O}"),(A.bigram_vocab_size!=1,'bigram_vocab_size: use 0 (off) or at least 2'),(A.eval_stride<=B,f"eval_stride: would skip tokens, use at most {B}"),(Y,f"ve_layers={A.ve_layers}: use different layers of 0..{C-1}, or none"),(E(A.beta1,A.beta2)<1,'beta1, beta2: must be below 1'),(1<=P<=64,f"passes_schedule={A.passes_schedule}: {W}, passes are 1..64"),(bool(V)and all(B%A==0 for(C,A)in V),f"{Z}: {W}, {a}"),((A.eval_passes or 1)<=64,'eval_passes: at most 64'),(A.eval_passes in(None,1)or P>1,'eval_passes: this model has no repeats'))
	@b
	def head_dim(self)->int:return self.model_dim//self.num_heads
	@b
	def mlp_dim(self)->int:return int(self.mlp_mult*self.model_dim)
	@b
	def batch_seqs(self)->int:return self.train_batch_tokens//self.train_seq_len
	@b
	def ve_layer_ids(self)->tuple[int,...]:A=[]if self.ve_layers in('','none')else self.ve_layers.split(',');return tuple(int(A)if A.strip().isdecimal()else-1 for A in A)
	@b
	def schedule(self)->tuple[tuple[float,int],...]:A=self;return((.0,A.num_passes),)if A.num_passes else A2(A.passes_schedule)
	@b
	def max_passes(self)->int:return E((A for(B,A)in self.schedule),default=0)
	def architecture(B):A=[A.name for A in j(B)];C=A[A.index('tokenizer_sha256'):A.index('matrix_lr')];return{A:R(B,A)for A in C}
def B4(kind,text):
	C=kind;B=text;A,D=Ax(C),B.strip().lower()
	if C is bool:return{'0':False,'false':False,'1':True,'true':True}[D]
	if type(None)in A:return None if D in('','none')else A[0](B)
	return A[A.index(B)]if A else C(B)
def B5():
	E,J,F=(__doc__ or'').partition('\n\n');G='train_gpt.py [--SETTING VALUE ...]';B=o.ArgumentParser('train_gpt.py',G,E,F,allow_abbrev=False);B.formatter_class=o.RawDescriptionHelpFormatter;B.add_argument('--env',metavar='FILE',help='a file of lines NAME=VALUE');C=B
	for A in j(X):
		if A.metadata['group']:C=B.add_argument_group(A.metadata['group'])
		D={'metavar':str(A.type).replace('Literal','one of ')}
		if A.type=='bool':D={'action':o.BooleanOptionalAction}
		H='--'+A.name.replace('_','-');I=f"{A.metadata['text']} [{A.name.upper()}={A.default}]";C.add_argument(H,default=o.SUPPRESS,help=I,**D)
	return B
def B6(path):
	A=path
	try:B=K(A).read_text(encoding='utf-8-sig').splitlines()
	except(S,h)as H:raise P(f"env={A} cannot be read ({H}): name a text file")from None
	B=[A for A in B if A.strip()and not A.startswith('#')];C=[A[:40]for A in B if'='not in A];G(not C,f"env={A} has a line that is no NAME=VALUE: {C[:1]}");D=[A.split('=',1)for A in B];I=[A.strip().removeprefix('export ').strip().lower()for(A,B)in D];E=dict(Q(I,(A.strip(' \t"\'')for(B,A)in D),strict=True));F=E.keys()-{A.name for A in j(X)};G(not F,f"env={A} has no settings {', '.join(F)}: see --help");return E
def AE(env,argv):
	F=env;H,I=B5().parse_known_args(argv);J,K=H.__dict__,H.env;del J['env'];D,S,A=Ay(X),X.__annotations__,[];T=[A for A in I if A.startswith('-')]
	for L in T or I:M=difflib.get_close_matches(L,['--'+A.replace('_','-')for A in D],1);A.append(f"unknown argument {L}: did you mean {M[0]if M else'--help'}?")
	U={A:F[A.upper()]for A in D if A.upper()in F};V={'file':B6(K)if K else{},'env':U,'flag':J};B,N={},dict.fromkeys(D,'default')
	for(O,W)in V.items():
		for(C,Q)in W.items():
			try:B[C]=B4(D[C],str(Q));N[C]=O
			except(h,Ao):Y=S[C].replace('Literal','one of ');A.append(f"{C}={Q} ({O}) is no {Y}")
	if'train_batch_tokens'not in B:R=E(1,B.get('train_seq_len',2048));Z=98304*int(F.get('WORLD_SIZE',1));B['train_batch_tokens']=E(1,Z//R)*R
	try:a=X(**B)
	except P as b:A.append(str(b))
	G(not A,'\n'.join(A));return a,N
B7=Av(seconds=300)
class AF(g):
	rank:int;world_size:int;device:A.device;dtype:A.dtype;compiles:bool=False
	@classmethod
	def start(J,hp:X)->AF:
		K,D=int(V.environ.get('RANK',0)),int(V.environ.get('WORLD_SIZE',1));B,E,C=A.device('cpu'),'gloo',A.float32
		if A.cuda.is_available():
			F,H=int(V.environ.get('LOCAL_RANK',0)),A.cuda.device_count();G(F<H,f"nproc_per_node: only {H} GPUs are visible, start as many");B,E=A.device('cuda',F),'cpu:gloo,cuda:nccl';A.cuda.set_device(B)
			if A.cuda.get_device_capability()>=(8,0):C=A.bfloat16
		if D>1:U.init_process_group(E,timeout=B7)
		I=hp.compile=='on'or hp.compile=='auto'and B.type=='cuda';A.compiler.set_stance('default'if I else'force_eager');C=C if hp.dtype=='auto'else R(A,hp.dtype);return J(K,D,B,C,I)
	@b
	def is_main(self)->bool:return self.rank==0
	@b
	def on_gpu(self)->bool:return self.device.type=='cuda'
	def sum_(A,x):
		if A.world_size>1:U.all_reduce(x)
		return x
	def barrier(B):B.sum_(A.zeros(1,device=B.device)).item()
	def from_main(C,value):
		B=[value]
		if C.world_size>1:U.broadcast_object_list(B,src=0,device=A.device('cpu'))
		return B[0]
	def share(A,count):return d(*(B*count//A.world_size for B in(A.rank,A.rank+1)))
def AG(value):
	A=value
	if m(A,tuple|list):return','.join(map(AG,A))or'none'
	if m(A,float):return f"{A:.6g}"
	B='!"#$&\'()*+,-./:;<=>?@[]^_`{|}~';return quote(str(A),safe=B,errors='surrogateescape')or'none'
class AH:
	def __init__(A,path,resume=False):
		C=resume;B=path;A.path,A.file,A.since=B,None,M.perf_counter();A.has_results=C
		if B is None:return
		try:B.parent.mkdir(parents=True,exist_ok=True);A.file=B.open('a'if C else'x',encoding='utf-8');x.flock(A.file,x.LOCK_EX|x.LOCK_NB)
		except BlockingIOError:raise P(f"run_id: another process writes {B}: wait for its end")from None
		except S as D:E=f"output_dir: cannot write {B} ({D.strerror}): choose another folder";raise P(E)from None
		A.file.write('\n'if A.file.tell()else'')
	def event(C,E='',/,**D):
		B=' '.join(filter(None,[E,*(f"{A}:{AG(B)}"for(A,B)in D.items())]));A=B.replace('%20',' ')if'text'in D else B;A='\r\x1b[K'+A if T.stdout.isatty()else A
		for(F,G)in((T.stdout,A),(C.file,B))if C.file else():
			with p(S):v(G,file=F,flush=True)
	def progress(A,text):
		if A.file and T.stdout.isatty():v(f"\r{text}[K",end='',flush=True)
	def phase(A,name):B=M.perf_counter();A.event('phase',name=name,seconds=f"{B-A.since:.3f}");A.since=B
	def abandon(A,error):
		B=error;A.event('failed',text=(str(B)or repr(B)).splitlines()[0])
		if A.file and not A.has_results:A.path.unlink(missing_ok=True)
class B8:
	def __init__(A):A.noted,A.advice,A.farewell=0,'',''
	def install(B):
		for A in(N.SIGTERM,N.SIGINT,N.SIGHUP):
			if N.getsignal(A)!=N.SIG_IGN:N.signal(A,B.handle)
	def handle(A,number,frame):
		B=number;C=N.Signals(B).name
		if A.noted or not A.advice:raise SystemExit(f"stopped by {C}{A.farewell}")
		A.noted=B;V.write(2,f"\n{C}: {A.advice}\n".encode())
B9,BA,BB=20240520,1,256
AI='run data/download_fineweb.py or data/prepare_text.py, or set DATA_PATH'
def AJ(path):A=path;B,C=A.stat().st_size,4*BB;D=F.fromfile(A,dtype='<i4',count=3).tolist();E=[B9,BA,(B-C)//2];H=f"data shard {A} of {B} bytes begins with {D} instead of {E}";I=B>C and B%2==0 and D==E;G(I,f"{H}: download or prepare it again");return F.memmap(A,dtype='<u2',mode='r',offset=C,shape=(D[2],))
def BC(data_path,split):B=split;A=data_path;C=u(A.glob(f"fineweb_{B}_*.bin"));G(bool(C),f"data_path={A} holds no fineweb_{B}_*.bin: {AI}");return C
def BD(paths):
	A=i.sha256()
	for C in paths:B=AJ(C);A.update(f"{C.name}:{D(B)}:".encode());A.update(B[:4096].tobytes()+B[-4096:].tobytes())
	return A.hexdigest()[:16]
def AK(hp):A=K(hp.data_path)/'tokenizer.model';B=A if A.exists()else'data/tokenizers/fineweb_1024_bpe.model';return K(hp.tokenizer_path or B)
def BE(path):
	A,B=AC.SentencePieceProcessor(),f"tokenizer_path={path}"
	try:A.LoadFromSerializedProto(path.read_bytes())
	except(Ap,S):raise P(f"{B} is no SentencePiece model: set TOKENIZER_PATH")from None
	C=not A.IsUnknown(A.PieceToId('▁'));G(C,f"{B} has no piece for the space, so that bytes would be miscounted");return A
def BF(hp,path):
	A=i.sha256(path.read_bytes()).hexdigest();B,C=K(hp.data_path)/'manifest.json',None
	try:C=y.loads(B.read_bytes())['tokenizer']['sha256']
	except(FileNotFoundError,Ao,TypeError):0
	except(S,h,Aq):raise P(f"data_path: {B} is damaged: prepare the data again")from None
	for(E,D)in(("model's",hp.tokenizer_sha256),("shards'",C)):F=f"tokenizer_path={path} is not the {E}, whose sha256 is {D}: use that one";G(D in(None,A),F)
	return A
class AL:
	def __init__(E,tokenizer,device):
		B=tokenizer;G=[]
		for C in range(B.vocab_size()):H=B.IdToPiece(C);F=not(B.IsControl(C)or B.IsUnknown(C)or B.IsUnused(C));I=1 if B.IsByte(C)else D(H.removeprefix('▁').encode());G.append([I*F,H.startswith('▁')*F,F])
		J=A.tensor(G,dtype=A.int32,device=device);E.length,E.space,E.inner=J.T.contiguous().unbind()
	def of(A,previous,target):B=target;return A.length[B]+A.space[B]*A.inner[previous]
class AM:
	def __init__(A,shards,hp,runtime):H=runtime;C=shards;A.shards,A.hp,A.runtime=C,hp,H;B,A.share=hp.train_seq_len,H.share(hp.batch_seqs);A.shape=A.share.stop-A.share.start,B+1;I=[E(0,D(A)//B-1)for A in C];A.first_window=F.cumsum([0,*I]);A.epoch_windows,A.epoch=int(A.first_window[-1]),-1;J=f"data_path: no training shard holds two windows of train_seq_len={B} tokens";G(A.epoch_windows>0,f"{J}: prepare more text or lower train_seq_len")
	def window(A,index):
		B,(C,I)=A.hp.train_seq_len,divmod(index,A.epoch_windows)
		if C!=A.epoch:D=F.random.default_rng([A.hp.seed,C]);A.epoch,A.phase=C,int(D.integers(B));A.order=D.permutation(A.epoch_windows)
		E=A.order[I];G=F.searchsorted(A.first_window,E,side='right')-1;H=int(A.phase+(E-A.first_window[G])*B);return A.shards[G][H:H+B+1]
	def batch(B,step):
		C=A.empty(B.shape,dtype=A.int32,pin_memory=B.runtime.on_gpu)
		for(D,E)in Q(C.numpy(),range(B.share.start,B.share.stop),strict=True):D[:]=B.window(step*B.hp.batch_seqs+E)
		return C.to(B.runtime.device,non_blocking=True)
class BG(g):loader:AM|None;val_tokens:F.ndarray;token_bytes:AL;facts:list[dict[str,f]]
def BH(hp,runtime):
	I=runtime;B=hp;M,J,P,Q,N=AK(B),0,[],None,None;R,U,S=BE(M),K(B.data_path),B.train_seq_len;V,L=BF(B,M),R.vocab_size();C=f"tokenizer_path={M} has {L} pieces";W=B.vocab_size in(None,L);G(W,f"{C}, not vocab_size={B.vocab_size}: use one of that size");B=z(B,vocab_size=L,tokenizer_path=str(M),tokenizer_sha256=V)
	for O in('val',)if B.evaluate else('train','val'):
		T=BC(U,O);H=[AJ(A)for A in T];X={'shards':D(H),'tokens':sum(map(D,H))};P.append({'split':O,**X,'fingerprint':BD(T)});Y=H[I.rank%D(H)::I.world_size];J=E(J,*(int(A.max())for A in Y))
		if O=='train':Q=AM(H,B,I)
		else:N=F.concatenate(H)
	C=f"{C}, the shards' largest token is {J}: use the shards' tokenizer";Z=A.tensor([J>=L,J>=L/2]).int();a,b=I.sum_(Z).tolist();G(not a and b>0,C);C=f"data_path: {D(N)} validation tokens are not more than a window of {S}";G(D(N)>S,f"{C}: prepare more text or lower train_seq_len");return B,BG(Q,N,AL(R,I.device),P)
AN=1e-06
AO=[q.CUDNN_ATTENTION,q.FLASH_ATTENTION]
AO+=[q.EFFICIENT_ATTENTION,q.MATH]
BI=tuple[C,C,int]
BJ=tuple[C,C]
def Y(function):B=function;C=A0(O(A.compile,B,dynamic=False,fullgraph=True));return wraps(B)(lambda*A,**B:C()(*A,**B))
def k(x):A._dynamo.maybe_mark_dynamic(x,0);return x
class BK(g):qkv:C;out:C;mlp_up:C;mlp_down:C;resid_mix:C;q_gain:C;xsa:bool
def l(x):return J.rms_norm(x,(x.size(-1),),eps=AN)
def BL(hp):C,B=hp.train_seq_len,hp.rope_dims;F=E(1.,C/1024)**(B/E(1,B-2));G=(10000*F)**-(A.arange(0,B,2).float()/E(1,B));D=A.outer(A.arange(C).float(),G);H=A.zeros(C,hp.head_dim-B);I,J=(A.cat([B*D,D,H],1)for B in(1,-1));return I.cos(),J.sin()
def AP(x,cos,sin,half):D=half;C=sin;B=cos;a,b,E=x.split([D,D,x.size(-1)-2*D],dim=-1);B,C=(A[:,None].to(x.dtype)for A in(B,C));return x*B+A.cat([b,a,E],dim=-1)*C
def BM(q,k,v):
	if q.device.type=='cpu':k,v=(A.repeat_interleave(q.size(2)//A.size(2),dim=2)for A in(k,v))
	q,k,v=(A.transpose(1,2)for A in(q,k,v));A=q.size(1)!=k.size(1);B=J.scaled_dot_product_attention(q,k,v,is_causal=True,enable_gqa=A);return B.transpose(1,2)
def BN(y,v):y=y.unflatten(2,(v.size(2),-1));v=J.normalize(v,dim=-1).unsqueeze(3);return(y-(y*v).sum(-1,keepdim=True)*v).flatten(2,3)
def BO(x,layer,value,rope):
	D=value;A=layer;x=J.linear(x,A.qkv).unflatten(-1,(-1,A.out.size(0)//A.q_gain.numel()));E,F,B=Bw.apply(x,A.q_gain,*rope)
	if D is not None:B=B+D[1]*D[0].view_as(B)
	C=BM(E,F,B);C=BN(C,B)if A.xsa else C;return J.linear(C.flatten(2),A.out)
def BP(x,layer):
	A=layer
	if Ai(x.device,x.dtype,A.mlp_up.shape):return By.apply(x.flatten(0,1),A.mlp_up,A.mlp_down).view_as(x)
	return J.linear(J.leaky_relu(J.linear(x,A.mlp_up),.5).square(),A.mlp_down)
def AQ(x,layer,value,skip,x0,rope):
	B=skip;A=layer
	if B is not None:x=x+B[1]*B[0]
	x=A.resid_mix[0]*x+A.resid_mix[1]*x0;x=x+BO(l(x),A,value,rope);return x+BP(l(x),A)
BQ=Y(AQ)
@Y
def BR(x:C,rows:list,x0:C,rope:BI,keep:int)->list[C]:
	A=[]
	for B in rows:x=AQ(x,*B,x0,rope);A.append(x)
	return A[-keep:]
def BS(x,rows,x0,rope,keep=1):
	B=rows
	if A.is_grad_enabled():
		for D in(x,x0,*(A[0]for B in B for A in B[1:]if A)):k(D)
		return[x,*BR(x,B,x0,rope,keep)]
	C=[x.view_as(x)]
	for E in B:C.append(BQ(C[-1],*E,x0,rope))
	return[x,*C[1:]]
def BT(ids,num_rows):B=num_rows;C=A.bitwise_xor(36313*ids[:,1:],27191*ids[:,:-1])%(B-1);return J.pad(C,(1,0),value=B-1)
@Y
def BU(ids:C,table:C,bigram:tuple[C,...],gate:C,dtype:A.dtype)->C:
	C=bigram;B=dtype;A=J.embedding(ids,table.to(B))
	if C:E,G,H=(A.to(B)for A in C);I=J.embedding(BT(ids,D(E)),E);A=A+H*J.linear(I,G)
	A,F=l(A),gate.sigmoid().to(B);return(1-F)*A+F*J.pad(A,(0,0,1,0))[:,:-1]
def AR(x,table,softcap):B=softcap;C=J.linear(l(x),table.to(x.dtype)).float();return B*A.tanh(C/B)
@Y
def BV(x:C,targets:C,table:C,softcap:float)->C:A=AR(x,table,softcap);return J.cross_entropy(A,targets.long(),reduction='none')
class BW(g):jacobian_proxy:C;growth:C;update:C;feedback:C
@Y
def BX(h:C,U:C,V:C,d:C)->tuple[C,C]:A=d.to(h.dtype)*(h@V.to(h.dtype)@U.to(h.dtype).T);return A,h+A
@Y
def BY(h:C,z:C,core_z:C,scale:C)->C:return h+scale.to(h.dtype)*(core_z-z)
@Y
def AS(h:C,h_next:C,c:C|None)->tuple[C,C]:D=h_next;B=O(A.linalg.vector_norm,dim=(1,2),dtype=A.float32);C=B(h)+1e-06;E=B(D-h)/C;F=A.zeros_like(C)if c is None else B(c)/C;G=A.stack([B(D)/C,E,F]);return J.relu(E-1).square(),G.mean(1).detach()
def BZ(h,core,num_passes,scales,feedback):
	G=feedback;F=scales;C,B=None,core(h);H=[AS(h,B,C)]
	for I in range(1,num_passes):
		h=E=B
		if G:C,E=BX(h,*G)
		B=BY(h,E,core(E),F[L(I,D(F))-1]);H.append(AS(h,B,C))
	J,K=Q(*H,strict=True);return B,BW(A.stack(J).sum(0),*A.stack(K).unbind(1))
class I(g):shape:tuple[int,...];group:str;start:At[[C],f]
def A3(bank):
	for A in bank:W.init.orthogonal_(A)
def A4(hp):
	A=hp;E,B,M,N,K=A.num_layers,A.model_dim,A.mlp_dim,A.vocab_size,A.bigram_dim;P,Q=A.num_kv_heads*A.head_dim,A.max_passes-1;S,R=L(A.core_start,E-A.core_end),D(A.ve_layer_ids);F,G=W.init.zeros_,W.init.ones_;H,J=O(O,W.init.normal_),O(O,W.init.constant_);C={'qo_bank':I((2*E,B,B),'bank',lambda w:A3(w.zero_()[:E])),'kv_bank':I((2*E,P,B),'bank',A3),'mlp_up_bank':I((E,M,B),'bank',A3),'mlp_down_bank':I((E,B,M),'bank',F),'tok_emb':I((N,B),'table',H(std=A.tied_embed_init_std)),'smear_gate':I((B,),'scalar',F),'resid_mix':I((E,2,B),'scalar',lambda w:w.zero_()[:,0].fill_(1)),'attn_scale':I((E,B),'scalar',G),'mlp_scale':I((E,B),'scalar',G),'q_gain':I((E,A.num_heads),'scalar',J(val=A.qk_gain_init)),'skip_weight':I((S,B),'scalar',G)}
	if A.bigram_vocab_size:C['bigram_table']=I((A.bigram_vocab_size,K),'table',F);C['bigram_proj']=I((B,K),'projection',H(std=K**-.5));C['bigram_scale']=I((),'scalar',J(val=.05))
	if R:C['ve_table']=I((N,A.ve_dim),'table',H(std=.01));C['ve_proj']=I((P,A.ve_dim),'projection',F);C['ve_scale']=I((),'scalar',J(val=.1));C['ve_layer_scale']=I((R,),'scalar',G)
	C['residual_scale']=I((Q,),'scalar',J(val=A.residual_scale_init))
	if Q and A.feedback_mode!='none':C['feedback_U']=I((B,A.feedback_rank),'scalar',F);C['feedback_V']=I((B,A.feedback_rank),'scalar',H(std=B**-.5));C['feedback_d']=I((B,),'scalar',G)
	return C
class AT(W.Module):
	@A.no_grad()
	def __init__(self,hp:X,dtype:A.dtype=A.float32)->None:
		B=self;super().__init__();B.hp,B.dtype=hp,dtype
		for(C,D)in A4(hp).items():B.register_parameter(C,W.Parameter(A.empty(D.shape)));D.start(B.get_parameter(C))
		E=A.arange(1,hp.num_layers+1).float().rsqrt()
		for(C,F)in Q(('cos','sin','depth'),(*BL(hp),E),strict=True):B.register_buffer(C,F,persistent=False)
	def parameters_of(A,part):return tuple(B for(A,B)in A.named_parameters()if A.startswith(part))
	def layers(B,qat_floor):
		H=qat_floor;C,D=B.hp,B.hp.num_layers;J=[C.core_start,C.core_end-C.core_start,D-C.core_end]
		def E(bank):
			B=bank.unflatten(0,(-1,D))
			if H is None:return B
			E,C,F=B.split(J,dim=1);G=Bp(k(C.flatten(0,2)),H).view_as(C);return A.cat([E,G,F],dim=1)
		(K,out),(L,M)=E(B.qo_bank),E(B.kv_bank);[F],[G]=E(B.mlp_up_bank),E(B.mlp_down_bank);I=B.depth[:,None,None];N,out=I*A.cat([K,L,M],dim=1),B.attn_scale[...,None]*out;F,G=I*F,B.mlp_scale[...,None]*G;O=N,out,F,G,B.resid_mix,B.q_gain;P=[A.to(B.dtype).unbind()for A in O];R=[A>=D-C.xsa_last_n and not C.core_start<=A<C.core_end for A in range(D)];return[BK(*A)for A in Q(*P,R,strict=True)]
	def value_embeddings(A,ids):
		B:list[BJ|None]=[None]*A.hp.num_layers
		if A.hp.ve_layer_ids:
			C=J.embedding(ids,A.ve_table.to(A.dtype))@A.ve_proj.to(A.dtype).T;D=(A.ve_scale*A.ve_layer_scale).to(A.dtype).unbind()
			for(E,F)in Q(A.hp.ve_layer_ids,D,strict=True):B[E]=C,F
		return B
	def hidden(A,ids,num_passes,qat_floor=None):
		C=ids;B,E=A.hp,C.size(1);H=A.cos[:E],A.sin[:E],B.rope_dims//2;I,J=A.parameters_of('bigram_'),A.parameters_of('feedback_');F=BU(k(C),A.tok_emb,I,A.smear_gate,A.dtype);K,L=A.layers(qat_floor),A.value_embeddings(C)
		def D(x,start,end,skips=(),keep=1):A=d(start,end);B=Aw(K[A],L[A],skips);return BS(x,[*B],F,H,keep)
		G=D(F,0,B.core_start,keep=B.core_start);M=lambda z:D(z,B.core_start,B.core_end)[-1];N,O=BZ(G[-1],M,num_passes,A.residual_scale,J);P=Q(G[:0:-1],A.skip_weight.to(A.dtype).unbind(),strict=False);return D(N,B.core_end,B.num_layers,[*P])[-1],O
	def logits(A,ids,num_passes):B,C=A.hidden(ids,num_passes);return AR(B,A.tok_emb,A.hp.logit_softcap)
	def forward(B,ids,targets,num_passes,qat_floor=None,score_last=None):
		C=score_last;A=targets;D,E=B.hidden(ids,num_passes,qat_floor)
		if C:D,A=D[:,-C:],A[:,-C:]
		F=k(D.flatten(0,1)),k(A.flatten());G=BV(*F,B.tok_emb,B.hp.logit_softcap);return G.view_as(A),E
Z='mlp_up_bank','mlp_down_bank','qo_bank','kv_bank'
AU='table','projection','scalar'
Ba=R(U,'all_gather_single',None)or U.all_gather_into_tensor
Bb=R(U,'reduce_scatter_single',None)or U.reduce_scatter_tensor
class AV:
	ALIGNMENT=64
	def __init__(B,model,world_size=1):
		G=model;C,L=dict(G.named_parameters()),A4(G.hp);B.shapes={A:B.shape for(A,B)in C.items()};(B.places):dict[str,d]={};(B.spans):dict[str,d]={};J={A:[A]for A in Z};J|={A:[B for B in C if L[B].group==A]for A in AU};E=0
		for(K,M)in J.items():
			N=E
			for D in M:
				B.places[D]=d(E,E+C[D].numel());I=B.ALIGNMENT
				if K in Z:I=world_size*H.lcm(C[D][0].numel(),B.ALIGNMENT)
				E+=H.ceil(C[D].numel()/I)*I
			B.spans[K]=d(N,E)
		assert n(B.places)==n(C),'every parameter is optimized exactly once';B.banks_end=B.spans['table'].start;B.data,B.grad=A.zeros(2,E,device=G.tok_emb.device).unbind()
		for(D,F)in C.items():F.data=B.data[B.places[D]].view(F.shape).copy_(F.data);F.grad=B.grad[B.places[D]].view(F.shape)
	def shard(A,flat,bank,runtime):B=runtime;C=flat[A.spans[bank]].view(-1,*A.shapes[bank][1:]);return C.chunk(B.world_size)[B.rank]
	def gather(A,flat,bank,runtime):B=A.shard(flat,bank,runtime).view(-1);return Ba(flat[A.spans[bank]],B,async_op=True)
	def named(A,flat):B={B:A for(B,A)in A.places.items()if A.stop<=D(flat)};return{A:flat[B[A]].view(C)for(A,C)in A.shapes.items()if A in B}
	def whole(A,span):B=W.Parameter(A.data[span]);B.grad=A.grad[span];return B
def Bc(g,dtype,steps=5):
	a,b,E=3.4445,-4.775,2.0315;D=g.size(-2)>g.size(-1);B=(g.mT if D else g).to(dtype);B=B/(B.norm(dim=(-2,-1),keepdim=True)+1e-07)
	for F in range(steps):C=B@B.mT;B=A.baddbmm(B,A.baddbmm(C,C,C,beta=b,alpha=E),B,beta=a)
	return B.mT if D else B
class AW:
	def __init__(D,flat,hp,runtime):E=runtime;C=hp;B=flat;D.flat,D.hp,D.runtime=B,C,E;D.momentum=A.zeros_like(B.data[:B.banks_end]);D.bank_grads={A:B.shard(B.grad,A,E)for A in Z};D.rest=B.grad[B.banks_end:];F=[(C.tied_embed_lr,C.adam_wd),(C.scalar_lr,C.adam_wd),(C.scalar_lr,.0)];G=[{'params':[B.whole(B.spans[A])],'base_lr':C,'weight_decay':D}for(A,(C,D))in Q(AU,F,strict=True)];D.adam=A.optim.AdamW(G,lr=.0,betas=(C.beta1,C.beta2),fused=True)
	def reduce(B):
		C,D=B.flat,B.runtime
		if D.world_size>1:
			F=[U.all_reduce(B.rest,async_op=True)]
			for E in Z:G=A.empty_like(C.shard(B.momentum,E,D));B.bank_grads[E],H=G,C.grad[C.spans[E]];F.append(Bb(G.view(-1),H,async_op=True))
			for I in F:I.wait()
		J=A.stack([A.square().sum()for A in B.bank_grads.values()]).sum();return(D.sum_(J)+B.rest.square().sum()).sqrt()
	@A.no_grad()
	def step(self,norm:C,lr_scale:float,momentum:float)->None:
		C=lr_scale;A=self;D=[];E=(A.hp.grad_clip_norm/(norm+1e-06)).clamp(max=1.)
		for B in Z:
			A.update_bank(B,A.bank_grads[B]*E,C,momentum)
			if A.runtime.world_size>1:D.append(A.flat.gather(A.flat.data,B,A.runtime))
		A.rest.mul_(E)
		for F in A.adam.param_groups:F['lr']=F['base_lr']*C
		A.adam.step()
		for G in D:G.wait()
	def update_bank(B,bank,grad,lr_scale,momentum):G=momentum;F=lr_scale;D=grad;C=B.flat.shard(B.flat.data,bank,B.runtime);L=B.flat.shard(B.momentum,bank,B.runtime).mul_(G).add_(D);D=J.normalize(D.add_(L,alpha=G),dim=-1,eps=1e-07);M=A.bfloat16 if C.is_cuda else A.float32;I=Bc(D,M);N=H.sqrt(E(1.,C.size(-2)/C.size(-1)));K=B.hp.matrix_lr*F;C.sub_(C*(I*C>0),alpha=K*F*B.hp.muon_wd);C.add_(I,alpha=-K*N)
class Bd:
	def __init__(B,hp,weights):C=weights;B.hp,B.weights=hp,C;B.ema=C.clone()if'ema'in hp.weight_average else None;B.swa=A.zeros_like(C)if'swa'in hp.weight_average else None;B.samples,B.last_progress,B.last_sample=0,.0,-1.
	def update(A,progress,swa):
		B=progress;C,A.last_progress=B-A.last_progress,B
		if A.ema is not None:D,E=(H.expm1(-B/A.hp.ema_frac)for B in(C,B));A.ema.lerp_(A.weights,D/E if B else 1.)
		if A.swa is not None and swa and B-A.last_sample>=A.hp.swa_frac:A.samples,A.last_sample=A.samples+1,B;A.swa.lerp_(A.weights if A.ema is None else A.ema,1/A.samples)
	def result(A):
		if A.samples:return A.swa
		return A.weights if A.ema is None else A.ema
class AX(g):num_passes:int;cuts:int;qat:bool;swa:bool;lr_scale:float;momentum:float
def r(hp,step,progress):B=progress;A=hp;G=[C for(A,C)in A.schedule if A<=B][-1];H=[C for(A,C)in A2(A.seq_len_schedule)if A<=B][-1];C=L(1.,E(.0,1-B)/A.warmdown_frac);F=L(1.,B/A.muon_momentum_warmup_frac);D=(1-F)*A.muon_momentum_warmup_start+F*A.muon_momentum;I=1-B/E(1,step)/A.muon_momentum_frac;D=L(D,E(.85,I));J,K=C<A.late_qat_threshold,C<A.swa_lr_scale;return AX(G,H,J,K,C,D)
def Be(hp):A=[r(hp,0,A/10000)for A in range(10000)];return list(dict.fromkeys((A.num_passes,A.cuts,A.qat)for A in A))
def s():return A._dynamo.utils.counters['stats']['unique_graphs']
class A5:
	def __init__(A,sequences,log):A.sequences,A.log=sequences,log
	def run(B,work):
		while True:
			try:return work(B.sequences)
			except A.OutOfMemoryError:G(B.sequences>1,'not one sequence fits the GPU: lower train_seq_len')
			B.sequences//=2;A.cuda.empty_cache();B.log.event('out_of_memory',sequences_at_once=B.sequences)
def AY(rows,most):A=rows;return list(A.tensor_split(H.ceil(D(A)/most)))if D(A)else[]
class Bf:
	def __init__(A,trainer):B=trainer;A.hp,A.runtime,A.stop=B.hp,B.runtime,B.stop;A.cap=A.hp.max_wallclock_seconds or H.inf;A.progress,A.interrupted=B.average.last_progress,False;A.recent=[.0];A.runtime.barrier();A.last=A.last_checkpoint=M.perf_counter();A.started=A.last-B.elapsed
	def elapsed(A):return M.perf_counter()-A.started
	def read(B,step):C,G=M.perf_counter(),B.hp.iterations;B.recent=[*B.recent[-15:],C-B.last];B.last=C;D=C-B.started+B.recent[-1]*B.runtime.on_gpu;I=D>=B.cap or D+E(B.recent)>B.cap;K=B.hp.checkpoint_seconds or H.inf;N=B.cap-D>=L(K,B.cap/10);F=N and C-B.last_checkpoint>=K;J=[float(A)*B.runtime.is_main for A in(D/B.cap,I,F)];J=A.tensor([*J,B.stop.noted],dtype=A.float64);O,I,F,P=B.runtime.sum_(J).tolist();B.last_checkpoint=C if F else B.last_checkpoint;B.interrupted=P>0;Q=.0 if G is None else step/E(1,G);B.progress=E(B.progress,L(O,1.),Q);R=I>0 or B.interrupted or step==G;return B.progress,R,F>0
	def forecast(A,passes):B=L(A.cap,A.elapsed()/E(A.progress,1e-09))-A.elapsed();return f"{passes} passes, {1000*A.recent[-1]:.0f} ms a step, {B:.0f} s left"
	def fields(B,step):A=1000*B.elapsed();return{'train_time':f"{A:.0f}ms",'step_avg':f"{A/E(1,step):.2f}ms"}
class Bg:
	def __init__(B,model,data,runtime,log,stop):E=runtime;D=model;B.hp,B.model,B.data,B.runtime=D.hp,D,data,E;B.log,B.stop=log,stop;B.limit=A5(B.hp.micro_batch_tokens//B.hp.train_seq_len,log);B.flat=AV(D,E.world_size);B.optimizer=AW(B.flat,B.hp,E);B.average=Bd(B.hp,B.flat.data);B.step,B.elapsed=0,.0;(B.plan):AX|None=None;B.phase_start=0;(B.floor_index):int|None=None;(B.norm_sent):tuple[C,A.cuda.Event|None,int]|None=None
	def accumulate(A,batch,passes,floor=None,cuts=1):return A.limit.run(O(A.accumulate_parts,batch,passes,floor,cuts))
	def accumulate_parts(B,batch,passes,floor,cuts,at_once):
		F=passes;E=B.hp;B.flat.grad.zero_();G=A.zeros(3+3*F,device=B.runtime.device)
		for C in AY(batch,at_once):H,I=(A.reshape(cuts*D(C),-1)for A in(C[:,:-1],C[:,1:]));M,J=B.model(H,I,F,floor);K,L=M.sum(),J.jacobian_proxy.sum()/cuts;N=E.jacobian_proxy_weight*L/E.batch_seqs;(K/E.train_batch_tokens+N).backward();O=B.data.token_bytes.of(H,I).sum();P=A.stack([K.detach(),O,L.detach()]);G+=A.cat([P,D(C)*A.cat(J[1:])])
		return G
	def warm_up(B,evaluator):
		K=evaluator;C,G,F,P=B.hp,B.flat,B.runtime,B.flat.data.clone();Q=A.Generator().manual_seed(C.seed);L=O(A.randint,C.vocab_size,generator=Q,dtype=A.int32);M,R=AW(G,C,F),A.ones((),device=F.device);H=Be(C);I=E(C.warmup_steps,D(H))if C.warmup_steps else 0
		for N in range(I):B.log.progress(f"warm-up: step {N+1} of {I}");S=L(B.data.loader.shape).to(F.device);T,U,V=H[N*D(H)//I];B.accumulate(S,T,R if V else None,U);M.step(M.reduce(),1.,.9)
		if I and F.compiles:W=L((C.ttt_chunk_tokens+2*C.train_seq_len,)).numpy();X=B.data._replace(val_tokens=W);J=Ah(C,X,F,AH(None));J.scoring,J.training=K.scoring,K.training;J.run_all(B.model,G,H[-1][0])
		G.data.copy_(P);G.grad.zero_()
	def train(B,evaluator,checkpoints,until=1.):
		D,E,C,I=B.hp,B.log,Bf(B),s();E.has_results,F=True,''
		while True:
			G,J,K=C.read(B.step)
			if J or G>=until:break
			if K:B.check_norm();B.elapsed=C.elapsed();Ac(B,checkpoints);C.last=M.perf_counter()
			L,N=B.take_step(G)
			if B.step%D.train_log_every==0 or B.step in(1,10):F=B.log_step(L,N,C)
			if D.val_loss_every and B.step%D.val_loss_every==0:B.runtime.barrier();O,P=M.perf_counter(),B.plan.num_passes;evaluator.run('validation',B.model,D.train_seq_len,P,step=B.step);C.last=M.perf_counter();C.started+=C.last-O
			E.progress(f"step {B.step}, {F}, {C.forecast(B.plan.num_passes)}")
		B.check_norm();B.runtime.barrier();B.elapsed,Q=C.elapsed(),A.cuda.max_memory_allocated()>>20;H={'graphs_compiled_after_start':s()-I};H|={'peak_memory_mib':Q,'interrupted':int(C.interrupted)};E.event('stop',step=B.step,**C.fields(B.step),**H);return C.interrupted
	def take_step(B,progress):
		G=progress;D,C=B.plan,r(B.hp,B.step,G);B.plan,E,H=C,{'step':B.step,'progress':G},None
		if D is None or C.num_passes!=D.num_passes:B.phase_start=B.step;B.log.event('progressive_passes',**E,num_passes=C.num_passes)
		if D is None or C.cuts!=D.cuts:B.log.event('seq_len',**E,tokens=B.hp.train_seq_len//C.cuts)
		if C.swa and not(D and D.swa)and B.average.swa is not None:B.log.event('swa',**E)
		if C.qat and B.floor_index is None:J=A9(B.flat.named(B.flat.data),Aj(B.hp));B.floor_index=I=B.runtime.from_main(J);B.log.event('late_qat',**E,floor_index=I,floor=c(I))
		if C.qat:H=A.full((),c(B.floor_index),device=B.runtime.device)
		K=B.data.loader.batch(B.step);L=B.accumulate(K,C.num_passes,H,C.cuts);F=B.optimizer.reduce();B.optimizer.step(F,C.lr_scale,C.momentum);B.average.update(G,C.swa);B.step+=1;M=F.detach().to('cpu',non_blocking=True);N=A.cuda.current_stream().record_event()if F.is_cuda else None;B.check_norm();B.norm_sent=M,N,B.step;return L,F
	def check_norm(A):
		if A.norm_sent is None:return
		(B,C,D),A.norm_sent=A.norm_sent,None
		if C is not None:C.synchronize()
		if not H.isfinite(B):E=f"step {D}: the gradient's norm is {float(B)}, the run diverged";raise Ar(f"{E}: lower matrix_lr or residual_scale_init")
	def log_step(A,sums,norm,clock):C,G,D=A.hp,A.plan,A.step;J,M,N,*I=A.runtime.sum_(sums).tolist();I=(F.array(I).reshape(3,-1)/C.batch_seqs).tolist();K,L=J/C.train_batch_tokens,J/H.log(2)/E(1,M);B={'step':f"{D}/{C.iterations}"if C.iterations else D};B|={'train_loss':f"{K:.4f}",'train_bpb':f"{L:.4f}"};B|={'passes':G.num_passes,'qat':int(G.qat),'lr_scale':G.lr_scale};A.log.event(**B,grad_norm=norm.item(),**clock.fields(D));B={'step':D,'jacobian_proxy':N/C.batch_seqs};B|=Q(('growth','update','feedback_norm'),I,strict=True);A.log.event('passes',**B,residual_scale=A.model.residual_scale.tolist());return f"loss {K:.3f}, {L:.3f} bits per byte"
	def average_weights(A):
		A.flat.data.copy_(A.average.result());E,F=A.hp.weight_average,A.average.samples;A.log.event('weight_average',kind=E,swa_samples=F);B=(A.plan or r(A.hp,0,.0)).num_passes;C,D=A.hp.eval_passes or B,A.step-A.phase_start
		if C>B or A.phase_start and D<A.step/100:G=f"scored with {C} passes, and only the last {D} of {A.step} steps";A.log.event('warning',text=f"{G} had {B}")
		return C
AZ='step','elapsed','phase_start','floor_index'
Aa='samples','last_progress','last_sample'
def Ab(trainer):A=trainer;C,D=A.hp,A.average;F='seed','train_batch_tokens','weight_average';B=C.architecture()|{A:R(C,A)for A in F};B|={'data':A.data.facts[0]['fingerprint']};del B['eval_passes'];E={'data':A.flat.data,'momentum':A.optimizer.momentum};E|={'ema':D.ema,'swa':D.swa};return B,{B:A for(B,A)in E.items()if A is not None}
def Ac(trainer,folder):
	E=folder;B=trainer;I,C,J=B.flat,B.runtime,B.optimizer.momentum
	if C.world_size>1:
		for K in[I.gather(J,A,C)for A in Z]:K.wait()
	if not C.is_main:return C.from_main(None)
	L,M=Ab(B);F={'settings':L,'adam':B.optimizer.adam.state_dict()};F|={A:R(B,A)for A in AZ};F|={A:R(B.average,A)for A in Aa};F['tensors']={A:I.named(B.to('cpu',copy=True))for(A,B)in M.items()};A.save(F,(N:=io.BytesIO()));G,H=E/f"step_{B.step:08d}.pt",N.getvalue()
	try:
		E.mkdir(parents=True,exist_ok=True);AB(G,i.sha256(H).digest()+H);O=u(E.glob('step_*.pt'),key=lambda other:(other<=G,other))
		for P in(*O[:-2],*E.glob('step_*.tmp')):P.unlink()
	except S as Q:B.log.event('checkpoint_failed',path=G,reason=Q.strerror);return C.from_main(False)
	B.log.event('checkpoint',step=B.step,path=G,bytes=32+D(H));return C.from_main(True)
def Bh(folder,runtime,log):
	B=runtime
	for D in B.from_main(u(folder.glob('step_*.pt'),reverse=True)):
		C=B.from_main(D.read_bytes()if B.is_main else None)
		if i.sha256(C[32:]).digest()==C[:32]:return A.load(io.BytesIO(C[32:]),map_location='cpu',weights_only=True)
		log.event('checkpoint_damaged',path=D)
def Bi(trainer,folder):
	H=folder;A=trainer;B=Bh(H,A.runtime,A.log)
	if B is None:D=f"{H} holds no whole checkpoint: training begins at step 0";A.log.event('warning',text=D);return
	I,J=A.average,A.optimizer.adam;(E,L),F=Ab(A),B['settings'];K=[f"{A}={E.get(A)} (was {F.get(A)})"for A in E|F if E.get(A)!=F.get(A)];D=f"resume: the checkpoint is of another run: {', '.join(K)}";G(not K,f"{D}: give what it began with, or choose another run_id")
	for(M,N)in L.items():
		for(C,O)in A.flat.named(N).items():O.copy_(B['tensors'][M][C])
	J.load_state_dict(J.state_dict()|{'state':B['adam']['state']})
	for(P,Q)in((A,AZ),(I,Aa)):
		for C in Q:setattr(P,C,B[C])
	A.plan=r(A.hp,A.step-1,I.last_progress);R=f"{1000*A.elapsed:.0f}ms";A.log.event('resume',step=A.step,train_time=R)
Bj=.999,.9995,.9999,.99999,1.
a,Bk=31,127
Bl=65536
Bm,A6=512,7168
Bn=[{'id':e.FILTER_LZMA2,'preset':6,'dict_size':4096,'lc':0,'lp':0,'pb':0}]
Ad=b'SGR1'
Bo=1<<30
def A7(w,levels,floor):
	I=levels;J=[(1-A)*(w.size(-1)-1)for A in Bj];B=w.abs().topk(L(w.size(-1),2+int(E(J)))).values;C=A.zeros_like(B[...,:1]);D=A.full_like(C,H.inf)
	for F in J:K,N=int(F),L(int(F)+1,B.size(-1)-1);O=A.lerp(B[...,K,None],B[...,N,None],F-K);G=A.maximum(O/I,floor).half().float();M=(t(w,G,I)*G-w).square().sum(-1,keepdim=True);C=A.where(M<D,G,C);D=A.minimum(M,D)
	return C
def t(w,scale,levels):B=levels;return A.round(w/scale).clamp(-B,B)
@Y
def Bp(w:C,floor:C)->C:
	with A.no_grad():B=A7(w,a,floor);C=t(w,B,a)*B
	return C+(w-w.detach())
def c(index):return 2.**(-index/Bm)
def A8(name,shape):A=shape;B=D(A)==2 and H.prod(A)>Bl;return a if name in Z else Bk if B else 0
def Ae(shapes):
	B=0
	for(D,A)in shapes.items():C,E=H.prod(A),H.prod(A[:-1]);B+=C+2*E if A8(D,A)else 2*C
	return B
def Bq(tensors,floor):
	D=[]
	for(F,B)in tensors.items():
		C=A8(F,B.shape)
		if C:G=floor if C==a else c(A6);E=A7(B,C,A.tensor(G,device=B.device));D+=[E.half(),(t(B,E,C)+C).to(A.uint8)]
		else:D.append(B.half())
	return b''.join(A.cpu().numpy().tobytes()for A in D)
def Br(payload,shapes):
	D,I={},io.BytesIO(payload)
	def E(dtype,shape):C=shape;B=dtype;D=F.frombuffer(I.read(H.prod(C)*F.dtype(B).itemsize),B);return A.from_numpy(D.astype(F.float32)).reshape(tuple(C))
	for(G,B)in shapes.items():C=A8(G,B);J=E(F.float16,(*B[:-1],1))if C else 1.;D[G]=(E(F.uint8 if C else F.float16,B)-C)*J
	return D
def Bs(header,tensors,floor_index):A=y.dumps(header,separators=(',',':')).encode();B=Ad+D(A).to_bytes(4,'little')+A;C=Bq(tensors,c(floor_index));return e.compress(B+C,format=e.FORMAT_XZ,filters=Bn)
def Af(tensors,floor):
	C=tensors;D=float(Ae({A:B.shape for(A,B)in C.items()}))
	for B in(C[A]for A in Z):E=A7(B,a,A.tensor(floor,device=B.device));F=(t(B,E,a)+a).to(A.uint8).flatten();G=A.bincount(F,minlength=2*a+1).double()/B.numel();I=A.special.entr(G).sum().item()/H.log(2);D-=B.numel()*(1-1.01*I/8)
	return D
def A9(tensors,limit_bytes):A=range(1,A6+1);return bisect.bisect(A,limit_bytes,key=lambda i:Af(tensors,c(i)))
def Bt(hp,tensors,path,log):
	M=log;I=tensors;F=path;A,N=Aj(hp),A0(O(Bs,hp.architecture(),I));B,J,C=0,A6+1,A9(I,A)
	for R in range(12):
		K,S=D(N(C)),Af(I,c(C));M.event('export_probe',floor_index=C,artifact_bytes=K);B,J=(C,J)if K<=A else(B,C)
		if .9995*A<=K<=A or J-B==1:break
		C=A9(I,A*S/K);C=E(L(C,J-2**R),B+1)
	H=D(N(B));Q,P=H<=A,hp.artifact_limit_bytes-A;T=F if Q else F.with_suffix('.oversize.xz');F=Ak(T,N(B),M);U={'code_bytes':P,'model_bytes':H,'total_bytes':P+H};V={'floor_index':B,'floor':c(B)};M.event('artifact',path=F,**U,margin_bytes=A-H,**V);W=f"artifact_limit_bytes={hp.artifact_limit_bytes}: code and model need {P+H}";G(Q,f"{W} at the coarsest setting, kept as {F}: make the model smaller");return F
def Bu(text):A,E=y.loads(text),X().architecture();G(m(A,dict)and n(A)==n(E),'its header is another one');B=A['train_seq_len'];C={'train_batch_tokens':B,'micro_batch_tokens':B,'eval_stride':1};C|={'seq_len_schedule':'0.0:1'};F={A.upper():str(B)for(A,B)in(A|C).items()};D,H=AE(F,[]);G(D.vocab_size is not None,'its header has no vocabulary');return D
def Ag(path):
	C=path;A=e.LZMADecompressor(e.FORMAT_XZ,memlimit=1<<26)
	try:F=A.decompress(C.read_bytes(),8);H=int.from_bytes(F[4:],'little');L=F[:4]!=Ad or not 0<H<1<<16;G(not L,'it does not begin like an artifact');I=Bu(A.decompress(b'',H));J={A:B.shape for(A,B)in A4(I).items()};B=Ae(J);G(B<=Bo,f"it claims {B} bytes of weights");K=A.decompress(b'',B+1);M=D(K)==B and A.eof and not A.unused_data;G(M,'it has too few or too many bytes')
	except S as E:raise P(f"artifact {C} cannot be read: {E.strerror}")from None
	except(e.LZMAError,EOFError,h,Aq,OverflowError)as E:N=f"artifact {C} is damaged or foreign ({E}): copy or export it again";raise P(N)from None
	return I,Br(K,J)
def Bv(first,last,seq_len,stride):G=stride;D=seq_len;C=first;A=last;H=L(A,E(C+G,D));B=F.array([*range(H,A,G),A],dtype=F.int64);return F.stack([F.maximum(B-D,0),F.append(C,B[:-1]),B],axis=1)
class Ah:
	def __init__(B,hp,data,runtime,log):E=runtime;C=log;B.hp,B.runtime,B.log=hp,E,C;B.scoring=A5(hp.eval_batch_seqs,C);B.training=A5(hp.micro_batch_tokens//hp.train_seq_len,C);B.tokens=A.from_numpy(data.val_tokens.astype(F.int32)).to(E.device);B.num_targets=D(B.tokens)-1;B.bytes=data.token_bytes.of(B.tokens[:-1],B.tokens[1:])
	@A.no_grad()
	def score(self,model:AT,targets:range,stride:int,passes:int,name:str|None=None)->C:
		A=self;D=O(A.score_windows,model,targets,stride,passes,name);B,C=A.scoring.run(D)
		for E in(B,C):A.runtime.sum_(E)
		if not bool((C[:-1]==1).all()):raise Ap('a target was not scored exactly once: this is a fault of scoring')
		return B[:-1]
	def score_windows(C,model,targets,stride,passes,name,size):
		J=stride;G=size;E=targets;B,H=C.hp.train_seq_len,C.runtime.device;K=A.zeros(D(E)+1,device=H);Q=A.zeros_like(K,dtype=A.int32);R=Bv(E.start,E.stop,B,J);I=R[C.runtime.share(D(R))];S=I[:,1]>=I[:,0]+B-J
		for(M,T)in((I[S],J),(I[~S],B)):
			for N in range(0,D(M),G):
				U=M[N:N+G];X=F.pad(U,((0,G-D(U)),(0,0)));V,Y,Z=A.from_numpy(X).to(H).unsqueeze(2).unbind(1);W=C.tokens[V+A.arange(B+1,device=H)];a,c=model(W[:,:-1],W[:,1:],passes,score_last=T);O=V+A.arange(B-T,B,device=H);b=(O>=Y)&(O<Z);P=A.where(b,O-E.start,D(E)).flatten();K.index_copy_(0,P,a.flatten());Q.index_add_(0,P,A.ones_like(P,dtype=A.int32))
				if name:C.log.progress(f"{name} {L(1,(N+G)/D(M)):4.0%}")
		return K,Q
	def bits_per_byte(B,losses):A=losses;return A.double().sum().item()/H.log(2)/int(B.bytes[:D(A)].sum())
	def report(A,name,losses,since,**E):B=losses;C={'val_loss':f"{B.double().mean().item():.8f}"};C|={'val_bpb':f"{A.bits_per_byte(B):.8f}",'tokens':D(B)};F=f"{M.perf_counter()-since:.3f}";A.log.event(name,**C,bytes=int(A.bytes.sum()),seconds=F,**E);A.log.has_results=True
	def run(A,name,model,stride,passes,**D):B=passes;E=M.perf_counter();C=A.score(model,range(A.num_targets),stride,B,name);A.report(name,C,E,passes=B,**D);return C
	def run_all(A,model,flat,passes):
		D=passes;C=model;B,F=A.hp,M.perf_counter()+(A.hp.eval_wallclock_seconds or H.inf);E=A.run('final_int6_roundtrip_exact',C,B.train_seq_len,D)
		if B.sliding_eval:E=A.run('final_int6_sliding_window_exact',C,B.eval_stride,D)
		if B.ttt_enabled:E=A.run_ttt(C,flat,D,F)
		return E
	def run_ttt(B,model,flat,passes,deadline):
		R=model;K=passes;C,N,O=B.hp,M.perf_counter(),0;S=A.optim.SGD([flat.whole(d(None))],momentum=.9);F=range(0,B.num_targets,C.ttt_chunk_tokens);I=A.zeros(B.num_targets,device=B.tokens.device)
		for(G,P)in enumerate(F,1):
			J=range(P,L(P+C.ttt_chunk_tokens,B.num_targets));I[P:J.stop]=B.score(R,J,C.eval_stride,K);Q,T=M.perf_counter(),D(F)-G
			if G%E(1,D(F)//20)==0:V,W=B.bits_per_byte(I[:J.stop]),f"{G}/{D(F)}";B.log.event('ttt_chunk',chunk=W,val_bpb=V,time=f"{Q-N:.1f}s")
			U=(Q-N)/G
			if not O:U*=1+3*C.ttt_epochs*C.eval_stride/C.train_seq_len
			X=Q+T*U<deadline
			if T and B.runtime.from_main(X):Y=H.cos(H.pi*(G-1)/(D(F)-1));S.param_groups[0]['lr']=C.ttt_lr*.5*(1+Y);B.train_on(R,flat,S,J,K);O+=1
			B.log.progress(f"legal_ttt {G}/{D(F)} chunks")
		Z=f"{O*C.ttt_epochs}/{(D(F)-1)*C.ttt_epochs}";B.report('legal_ttt_exact',I,N,passes=K,epochs=Z);return I
	def train_on(B,model,flat,sgd,targets,passes):
		D=targets;C=flat;E,F=B.hp,B.hp.train_seq_len;G=range(D.start,D.stop-F+1,F);H=A.tensor(G,dtype=A.int64,device=B.tokens.device)
		for I in list(H.split(E.ttt_batch_seqs))*E.ttt_epochs:B.training.run(O(B.accumulate,model,C,I,passes));J=B.runtime.sum_(C.grad).norm();C.grad.mul_((1/(J+1e-06)).clamp(max=1.));sgd.step()
	def accumulate(B,model,flat,starts,passes,at_once):
		C=starts;flat.grad.zero_();H,E=C[B.runtime.share(D(C))],B.hp.train_seq_len
		for F in AY(H,at_once):G=B.tokens[F[:,None]+A.arange(E+1,device=F.device)];I,J=model(G[:,:-1],G[:,1:],passes);(I.sum()/(D(C)*E)).backward()
class Bw(A.autograd.Function):
	@w
	def forward(ctx:f,x:C,gain:C,cos:C,sin:C,half:int)->tuple[C,...]:A=gain;C,B=D(A),(x.size(2)-D(A))//2;A=J.pad(A,(0,B),value=1.)[:,None];ctx.save_for_backward(x,A,cos,sin);ctx.half=half;E,F=x.split([C+B,B],dim=2);G,H=(A*AP(l(E),cos,sin,half)).split([C,B],dim=2);return G,H,F
	@w
	def backward(ctx:f,dq:C,dk:C,dv:C)->tuple[C|None,...]:B,E,J,K=ctx.saved_tensors;F=A.promote_types(B.dtype,A.float32);B,C=B[:,:,:D(E)].to(F),A.cat([dq,dk],dim=2);C=AP(C,J,-K,ctx.half).to(F);G=(B.square().mean(-1,keepdim=True)+AN).rsqrt();H=G*B;I=(C*H).sum(-1,keepdim=True);L=E*G*(C-H*I/B.size(-1));M=I.sum((0,1,3))[:dq.size(2)].to(E.dtype);return A.cat([L.to(dv.dtype),dv],dim=2),M,None,None,None
if triton is not None:
	@triton.jit
	def Bx(a:tl.tensor_descriptor,b:tl.tensor_descriptor,s:tl.tensor_descriptor,out:tl.tensor_descriptor,N:tl.constexpr,K:tl.constexpr,BACKWARD:tl.constexpr)->None:
		B:tl.constexpr=N//128;O=tl.cdiv(out.shape[0],128)*B
		for G in tl.range(tl.program_id(0),O,tl.num_programs(0),flatten=not BACKWARD):
			C,D=G//B*128,G%B*128;E=tl.zeros((128,128),tl.float32)
			for H in range(0,K,64):E=tl.dot(a.load([C,H]),b.load([D,H]).T,E)
			P,Q=E.reshape(128,2,64).permute(0,2,1).split()
			for F in tl.static_range(2):
				A=P if F==0 else Q
				if BACKWARD:I=s.load([C,D+64*F]);R=I.to(tl.int16,bitcast=True)&1==1;J=A*tl.where(R,-1,2)*tl.sqrt(I.to(tl.float32))
				else:L=tl.where(A<0,.5*A,A);M=tl.minimum((L*L).to(tl.int32,bitcast=True),2143289344);S,T=M+65536&-131072,M&-131072|65536;J=tl.where(A<0,T,S).to(tl.float32,bitcast=True)
				out.store([C,D+64*F],J.to(out.dtype))
	@library.custom_op('train_gpt::fused_product',mutates_args=())
	def AA(a:C,b:C,s:C|None)->C:out=a.new_empty(a.size(0),b.size(0));B=2*A.cuda.get_device_properties(a.device).multi_processor_count;C=[A.contiguous()for A in(a,b,out if s is None else s,out)];D=[B0.from_tensor(A,[128,64])for A in C];Bx[B,](*D,*b.shape,s is not None);return out
	AA.register_fake(lambda a,b,s:a.new_empty(a.size(0),b.size(0)))
class By(A.autograd.Function):
	@w
	def forward(ctx:f,x:C,up:C,down:C)->C:s=AA(x,up,None);ctx.save_for_backward(x,up,down,s);return J.linear(s,down)
	@w
	def backward(ctx:f,dy:C)->tuple[C,...]:B,C,D,s=ctx.saved_tensors;A=AA(dy,D.T,s);return A@C,A.T@B,dy.T@s
def Ai(device,dtype,up_shape):C=up_shape;B=device;D=dtype==A.bfloat16 and C[0]%128==0==C[1]%64;E=B.type=='cuda'and A.version.hip is None and triton is not None;return D and E and A.cuda.get_device_capability(B)[0]==9
def Bz(hp,runtime):D=runtime;A=hp;J=D.from_main(A.run_id or f"{M.strftime('%Y%m%d_%H%M%S')}_seed{A.seed}");L='.txt','.int6.xz','.checkpoints';B,C,E=(K(A.output_dir)/f"{J}{B}"for B in L);F=(C,)if A.resume else(B,C,E);F=(B,)if A.evaluate else F;H=D.from_main([str(A)for A in F if A.exists()]);I={str(C):f", or score it again with --evaluate {C}"};I|={str(E):', or go on from its checkpoint with --resume'};N='choose another run_id'+next((I[A]for A in I if A in H),'');G(not H,f"run_id: {', '.join(H)} would be overwritten: {N}");O=B.is_file()and b'\nartifact 'in B.read_bytes()and A.resume;P=f"run_id: {B} is of a finished run, which is not resumed";G(not D.from_main(O),f"{P}: choose another run_id");return B,C,E
def B_(hp):A=hp;B,C=K(A.output_dir).absolute(),K(A.token_losses or'losses.npy');G=next(A for A in(B,*B.parents)if A.exists());H=bool(A.evaluate)or shutil.disk_usage(G).free>A.artifact_limit_bytes;D,E=K(A.evaluate or __file__),AK(A);F=any(K(A.data_path).glob('fineweb_val_*.bin'));I=E.is_file()or not(F or A.tokenizer_path);A1((D.is_file(),f"artifact {D} cannot be read: no such file"),(F,f"data_path={A.data_path} holds no fineweb_val_*.bin: {AI}"),(I,f"tokenizer_path={E} is missing: set it"),(C.parent.is_dir()and not C.is_dir(),f"token_losses={C} can be no file"),(H,f"output_dir={B}: less than {A.artifact_limit_bytes} bytes free"))
def Aj(hp):return hp.artifact_limit_bytes-K(__file__).stat().st_size
def AB(path,data):
	A=path;B=A.with_name(A.name+'.tmp')
	try:B.write_bytes(data);B.replace(A)
	except S:B.unlink(missing_ok=True);raise
def Ak(path,data,log):
	A=path
	with p(S):AB(A,data);return A
	B=K(As.mkdtemp(prefix='train_gpt_'))/A.name;C=f"{A} cannot be written, {B} is instead";log.event('warning',text=C);v(f"warning: {C}",file=T.stderr);AB(B,data);return B
def C0(hp,sources,runtime,log):
	I=sources;E=hp;C=runtime;B=log;J=K(__file__).read_bytes();N=i.sha256(J).hexdigest();B.event('code',name=K(__file__).name,bytes=D(J),sha256=N);L={'torch':A.__version__,'cuda':A.version.cuda,'numpy':F.__version__};L|={'sentencepiece':AC.__version__,'triton':R(triton,'__version__',None)};B.event('versions',python=T.version.split()[0],**L);O=f"{V.uname().machine} x{V.cpu_count()}";G=A.cuda.get_device_name()if C.on_gpu else O
	if C.on_gpu and C.dtype==A.float32:B.event('warning',text='computes in float32: this GPU has no bfloat16, or dtype is set')
	B.event('device',name=G,world_size=C.world_size,dtype=str(C.dtype)[6:]);H={A.name:str(R(E,A.name))for A in j(E)};M={A:B for(A,B)in H.items()if I[A]=='default'}
	for G in[A for A in H if A not in M]:B.event('config',name=G,value=H[G],source=I[G])
	B.event('defaults',**M)
	if not C.on_gpu and not E.evaluate and E.model_dim*E.num_layers>4096:P='a model of this size takes minutes a step on a CPU: --env scripts/demo.env is small';B.event('warning',text=P)
def Al(hp,runtime,log):
	B=runtime;A._dynamo.config.recompile_limit=128
	if hasattr(A._inductor.config.triton,'mix_order_reduction'):A._inductor.config.triton.mix_order_reduction=False
	A.manual_seed(hp.seed);C=AT(hp,B.dtype).to(B.device);D={'parameters':sum(A.numel()for A in C.parameters())};E=Ai(B.device,B.dtype,C.mlp_up_bank.shape[1:]);D|={'fused_mlp':int(E),'compile':'on'if B.compiles else'off'};log.event('model',**D);return C
def Am(hp,stored):A=stored;B=A.train_seq_len;C={'train_batch_tokens':B,'micro_batch_tokens':E(B,hp.micro_batch_tokens)};C|={'eval_stride':L(B,hp.eval_stride),'seq_len_schedule':'0.0:1'};C['eval_passes']=hp.eval_passes or A.eval_passes or A.max_passes;return z(hp,**A.architecture()|C)
def C1(trainer,evaluator,artifact,checkpoints):
	G=checkpoints;F=evaluator;B=artifact;A=trainer;C,D,E=A.hp,A.log,A.stop
	if C.resume:Bi(A,G)
	A.warm_up(F);D.phase('warm_up');H=C.on_signal=='checkpoint';I='; a second signal ends it at once';J=f"the run exports and scores what it has{I}";E.advice=f"the run writes a checkpoint and ends{I}"if H else J;K=A.train(F,G);D.phase('training')
	if K and H and Ac(A,G):return AD,B
	E.advice=J;L=A.average_weights();F.run('pre_quant_exact',A.model,C.train_seq_len,L);D.phase('pre_quant_evaluation')
	if A.runtime.is_main:M=A.flat.named(A.flat.data);B=Bt(z(C,eval_passes=L),M,B,D)
	D.phase('export');N=f"--evaluate {B} --data-path {C.data_path}";E.advice,E.farewell='',f": score {B} with {N} and the same settings";return B3 if K else 0,B
def C2(hp,artifact,evaluator):
	D=evaluator;A=hp;C,B,H=D.runtime,D.log,s();E,I=C.from_main(Ag(artifact)if C.is_main else None);A=Am(A,E)
	if A.eval_passes>(E.eval_passes or E.max_passes):B.event('warning',text=f"scores with {A.eval_passes} passes, more than the run itself")
	G=Al(A,C,B);G.load_state_dict(I);J=D.run_all(G,AV(G),A.eval_passes);B.event('evaluated',graphs_compiled=s()-H);B.phase('evaluation')
	if A.token_losses and C.is_main:F.save((L:=io.BytesIO()),J.cpu().numpy());Ak(K(A.token_losses),L.getvalue(),B)
def C3(hp,sources,runtime,stop):
	E=sources;B=runtime;A=hp;B_(A);H,D,J=Bz(A,B)
	if A.evaluate:D=K(A.evaluate);A=Am(A,B.from_main(Ag(D)[0]if B.is_main else None));L='eval_passes'if E['eval_passes']!='default'else'';E|={A:'artifact'for A in A.architecture()if A!=L}
	A,F=BH(A,B);C,G=AH(H if B.is_main else None,A.resume),0
	try:
		C.event('run',run_id=H.stem,started=M.strftime('%Y%m%d_%H%M%S'));C0(A,E,B,C)
		for N in F.facts:C.event('data',**N)
		C.phase('start');I=Ah(A,F,B,C)
		if not A.evaluate:O=Bg(Al(A,B,C),F,B,C,stop);G,D=C1(O,I,D,J)
		if G!=AD:C2(A,D,I)
		return G
	except BaseException as P:C.abandon(P);raise
def C4():
	A,B=None,B8();B.install()
	try:
		C,E=AE(V.environ,T.argv[1:]);A=AF.start(C)
		with Az(AO,set_priority=True):F=C3(C,E,A,B)
		A.barrier();return F
	except(P,Ar)as D:v('\n'.join(f"error: {A}"for A in str(D).splitlines()),file=T.stderr);return B1 if m(D,P)else B2
	finally:
		if A is not None and A.world_size>1:U.destroy_process_group()
if __name__=='__main__':
	C5=C4()
	with p(S):T.stdout.flush()
	V._exit(C5)
