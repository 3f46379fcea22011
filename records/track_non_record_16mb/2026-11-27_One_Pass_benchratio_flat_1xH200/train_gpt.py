"Stable Growing Recurrence: a GPT that grows by re-applying its core while it trains.\n\n    stem -> core, core, ... -> tail      1 pass, then more as the run proceeds\n\nOne run trains for a fixed wall clock, averages the weights, quantizes them to int6 and compresses\nthem so that code and model fit 16,000,000 bytes. Then it reloads the file and scores the validation\ntext in bits per byte: plain, with sliding windows, and with score-first test-time training.\n\n    torchrun --standalone --nproc_per_node=8 train_gpt.py        one node of 8 GPUs, 600 s\n    python train_gpt.py                                          one process, GPU or CPU\n    python train_gpt.py --env scripts/demo.env                   the settings of a file\n    python train_gpt.py --evaluate logs/RUN.int6.xz              score an artifact again\n    python train_gpt.py --run-id RUN --resume                    go on from RUN's last checkpoint\n\nEvery setting is a flag (--residual-scale-init) and an environment variable (RESIDUAL_SCALE_INIT);\na flag wins over a variable, and a variable over --env's file. Exit codes: 0 done, 1 ended at once\nby a signal, 2 a mistake in what was given, 3 diverged, 4 stopped by a signal with a checkpoint,\n5 stopped by a signal but exported and scored.\n"
from __future__ import annotations
Ap=FloatingPointError
Ao=RecursionError
An=RuntimeError
Am=KeyError
Al=ImportError
v=staticmethod
u=print
o=sorted
n=set
m=isinstance
h=ValueError
e=slice
d=property
Z=getattr
R=OSError
Q=zip
M=min
E=max
D=len
import argparse as p,difflib,fcntl as w,hashlib as i,io,json as x,lzma as f,math as G,os as S,shutil,signal as O,sys as T,tempfile as Aq,time as K
from collections.abc import Callable as Ar,Mapping,Sequence
from contextlib import suppress as q
from dataclasses import dataclass as As,field,fields as j,replace as y
from datetime import timedelta as At
from functools import cache as AA,cached_property as Au,partial as N,wraps
from itertools import zip_longest as Av
from pathlib import Path as L
from typing import Any as a,Literal,NamedTuple as g,get_args as Aw,get_type_hints as Ax
from urllib.parse import quote
if __name__=='__main__':O.signal(O.SIGINT,O.SIG_DFL)
try:import numpy as F,sentencepiece as AB,torch as A,torch.distributed as b,torch.nn.functional as J;from torch import Tensor as C,library,nn as U;from torch.nn.attention import SDPBackend as r,sdpa_kernel as Ay
except Al as Az:T.exit(f"error: {Az.name} is not installed: run pip install -r requirements.txt")
try:import triton,triton.language as tl;from triton.tools.tensor_descriptor import TensorDescriptor as A_
except Al:triton=None
B0,B1,AC,B2=2,3,4,5
class P(h):0
def H(rule_holds,text):
	if not rule_holds:raise P(text)
def z(*B):A=[B for(A,B)in B if not A];H(not A,'\n'.join(A))
def B(default,text,least=0,group=''):return field(default=default,metadata={'text':text,'least':least,'group':group})
@As(frozen=True)
class V:
	run_id:str|None=B(None,'name of log and artifact; none: time and seed',group='run');seed:int=B(1337,'seed of the weights and of the data order');output_dir:str=B('logs','folder of the log, the artifact and the checkpoints');iterations:int|None=B(None,'steps after which training ends; none: no limit');max_wallclock_seconds:float|None=B(6e2,'seconds of training; none: no limit',.001);warmup_steps:int=B(20,'steps before the clock starts, undone before it does');train_log_every:int=B(50,'steps between lines of the log',1);val_loss_every:int|None=B(None,'steps between validations; none: at the end',1);checkpoint_seconds:float|None=B(None,'seconds between checkpoints; none: off',.001);resume:bool=B(False,'go on from the newest checkpoint of run_id, if there is one');on_signal:Literal['export','checkpoint']=B('export','at SIGTERM, SIGINT or SIGHUP');dtype:Literal['auto','bfloat16','float32']=B('auto','auto: bfloat16 where it is native');compile:Literal['auto','on','off']=B('auto','torch.compile; auto: on a GPU only');data_path:str=B('data/datasets/fineweb10B_sp1024','folder of the shards',group='data');tokenizer_path:str|None=B(None,"none: data_path's tokenizer.model, or the field's");train_batch_tokens:int=B(786432,'tokens of a step; default: 98,304 a process',1);micro_batch_tokens:int=B(98304,'most tokens that a rank takes at once',1);shuffle:bool=B(True,'read the windows of all shards in a seeded random order');vocab_size:int|None=B(None,"pieces; none: the tokenizer's",8,group='model');train_seq_len:int=B(2048,'tokens of a window, in training and evaluation',8);num_layers:int=B(11,'unique layers',1);model_dim:int=B(512,'width of the residual stream',1);num_heads:int=B(8,'query heads',1);num_kv_heads:int=B(4,'key and value heads',1);mlp_mult:float=B(3.,'MLP width over model width');rope_dims:int=B(16,'dims of each head that RoPE turns');qk_gain_init:float=B(1.5,'start of the gain of each query head',-G.inf);xsa_last_n:int=B(4,"last layers with XSA (never the core's)");bigram_vocab_size:int=B(512,'rows of BigramHash; 0: off');bigram_dim:int=B(32,"width of BigramHash's rows",1);ve_dim:int=B(128,'width of the value embedding table',1);ve_layers:str=B('9,10','layers with value embeddings; none: off');logit_softcap:float=B(3e1,'bound of the logits',.001);tied_embed_init_std:float=B(.005,'std of the embedding at the start');core_start:int=B(4,'first layer of the core',group='recurrence');core_end:int=B(7,"layer after the core's last",1);passes_schedule:str=B('0.0:1,0.6:2,0.85:3','start:passes, ...; starts are fractions');num_passes:int|None=B(None,"fixed passes in training; none: the schedule's",1);eval_passes:int|None=B(None,'passes in evaluation; none: as training ended',1);residual_scale_init:float=B(1.,"start of each later pass's scale",-G.inf);feedback_mode:Literal['none','diagonal']=B('none',"diagonal: c = d * U(V'h)");feedback_rank:int=B(2,'columns of U and V',1);jacobian_proxy_weight:float=B(.01,'weight of the proxy in the loss');matrix_lr:float=B(.025,"Muon's learning rate",group='optimization');tied_embed_lr:float=B(.035,"AdamW's learning rate of the tables");scalar_lr:float=B(.025,"AdamW's learning rate of all else");muon_momentum:float=B(.99,"Muon's momentum");muon_momentum_warmup_start:float=B(.92,"Muon's first momentum");muon_momentum_warmup_frac:float=B(.237,'its rise (1,500 of 6,330 steps)',1e-09);muon_momentum_frac:float=B(.0158,'its longest average (100 of 6,330 steps)',1e-09);muon_wd:float=B(.04,'decoupled weight decay of the banks');adam_wd:float=B(.04,'decoupled weight decay of tables and projections');beta1:float=B(.9,"AdamW's first decay");beta2:float=B(.95,"AdamW's second decay");grad_clip_norm:float=B(.3,"bound of the global gradient's norm");warmdown_frac:float=B(.55,'last fraction, in which the lr falls to 0',1e-09);weight_average:Literal['none','ema','swa','ema_swa']=B('ema','exported',group='end');ema_frac:float=B(.0526,"EMA's horizon (decay 0.997 in 6,330 steps)",1e-09);swa_frac:float=B(.0079,"fraction between SWA's samples (50 of 6,330 steps)");swa_lr_scale:float=B(.2,'SWA starts below this lr scale');late_qat_threshold:float=B(.15,"the core's QAT starts below this lr scale; 0: never");evaluate:str|None=B(None,'score this artifact, do not train',group='evaluation');artifact_limit_bytes:int=B(16000000,'most bytes of code and model together',1);eval_wallclock_seconds:float|None=B(6e2,'TTT epochs drop to end within this');eval_stride:int=B(64,'tokens that a sliding window scores',1);eval_batch_seqs:int=B(64,'windows that a rank scores at once',1);sliding_eval:bool=B(True,'score with sliding windows');ttt_enabled:bool=B(True,'score with score-first test-time training');ttt_lr:float=B(.002,"SGD's learning rate for the first chunk");ttt_epochs:int=B(3,'epochs over each chunk once it is scored');ttt_chunk_tokens:int=B(32768,'tokens of a chunk',1);ttt_batch_seqs:int=B(32,'most sequences of an SGD step, all ranks together',1);token_losses:str|None=B(None,"write the last evaluation's losses here (.npy, nats)")
	def __post_init__(A):
		M=[]
		for F in j(A):H,N=Z(A,F.name),F.metadata['least'];U=not m(H,int|float)or N<=H<G.inf;M.append((U,f"{F.name}={H} must be a finite number of at least {N}"))
		z(*M);B,C,O,P=A.train_seq_len,A.num_layers,A.head_dim,A.max_passes;Q,I,R,J=A.model_dim,A.num_heads,A.num_kv_heads,A.train_batch_tokens;S,T,K=A.core_start,A.core_end,A.ve_layer_ids;V=D(n(K))==D(K)and all(0<=A<C for A in K);W=A.iterations is None and A.max_wallclock_seconds is None;X='starts rise from 0 and are below 1, passes are 1..64';z((not W,'iterations, max_wallclock_seconds: set one, or training never ends'),(L(A.run_id or'x').name==(A.run_id or'x'),'run_id: no folders, a name'),(bool(A.run_id)or not A.resume,'resume: name the run that goes on, --run-id'),(J%B==0,f"train_batch_tokens={J}: use {E(1,J//B)*B} or such"),(A.micro_batch_tokens>=B,f"micro_batch_tokens: must hold a window of {B} tokens"),(B<=1<<20,f"train_seq_len={B} must be at most {1<<20}"),((A.vocab_size or 0)<=65536,'vocab_size: token ids are 16 bits wide'),(S<T<=C,f"core_start={S}, core_end={T}: no part of the {C} layers"),(A.mlp_dim>=1,f"mlp_mult={A.mlp_mult} leaves no MLP: raise it"),(Q%I==I%R==0,f"model_dim={Q}, num_heads={I}, num_kv_heads={R} must divide"),(A.rope_dims%2==0 and A.rope_dims<=O,f"rope_dims: even and up to {O}"),(A.bigram_vocab_size!=1,'bigram_vocab_size: use 0 (off) or at least 2'),(A.eval_stride<=B,f"eval_stride: would skip tokens, use at most {B}"),(V,f"ve_layers={A.ve_layers}: use different layers of 0..{C-1}, or none"),(E(A.beta1,A.beta2)<1,'beta1, beta2: must be below 1'),(1<=P<=64,f"passes_schedule={A.passes_schedule}: {X}"),((A.eval_passes or 1)<=(64 if P>1 else 1),'eval_passes: at most 64, or 1'))
	@d
	def head_dim(self)->int:return self.model_dim//self.num_heads
	@d
	def mlp_dim(self)->int:return int(self.mlp_mult*self.model_dim)
	@d
	def batch_seqs(self)->int:return self.train_batch_tokens//self.train_seq_len
	@d
	def ve_layer_ids(self)->tuple[int,...]:A=[]if self.ve_layers in('','none')else self.ve_layers.split(',');return tuple(int(A)if A.strip().isdecimal()else-1 for A in A)
	@Au
	def growth(self)->tuple[tuple[float,int],...]:
		B=self
		if B.num_passes:return(.0,B.num_passes),
		with q(h):
			C=[A.split(':')for A in B.passes_schedule.split(',')];A,D=[float(A)for(A,B)in C],[int(A)for(B,A)in C]
			if A[0]==0 and A==o({*A})and A[-1]<1<=M(D):return tuple(Q(A,D,strict=True))
		return()
	@d
	def max_passes(self)->int:return E((A for(B,A)in self.growth),default=0)
	def architecture(B):A=[A.name for A in j(B)];C=A[A.index('vocab_size'):A.index('matrix_lr')];return{A:Z(B,A)for A in C}
def B3(kind,text):
	C=kind;B=text;A,D=Aw(C),B.strip().lower()
	if C is bool:return{'0':False,'false':False,'1':True,'true':True}[D]
	if type(None)in A:return None if D in('','none')else A[0](B)
	return A[A.index(B)]if A else C(B)
def B4():
	E,I,F=(__doc__ or'').partition('\n\n');G='train_gpt.py [--SETTING VALUE ...]';B=p.ArgumentParser('train_gpt.py',G,E,F,allow_abbrev=False);B.formatter_class=p.RawDescriptionHelpFormatter;B.add_argument('--env',metavar='FILE',help='a file of lines NAME=VALUE');D=B
	for A in j(V):
		if A.metadata['group']:D=B.add_argument_group(A.metadata['group'])
		C={'metavar':str(A.type).replace('Literal','one of ')}
		if A.type=='bool':C={'action':p.BooleanOptionalAction}
		C|={'help':f"{A.metadata['text']} [{A.name.upper()}={A.default}]"};H='--'+A.name.replace('_','-');D.add_argument(H,default=p.SUPPRESS,**C)
	return B
def B5(path):
	A=path
	try:E=L(A).read_text(encoding='utf-8-sig').splitlines()
	except(R,h)as F:raise P(f"env={A} cannot be read ({F}): name a text file")from None
	B=[A.split('=',1)for A in E if'='in A and A[0]!='#'];G=[A.strip().removeprefix('export ').strip().lower()for(A,B)in B];C=dict(Q(G,(A.strip(' \t"\'')for(B,A)in B),strict=True));D=C.keys()-{A.name for A in j(V)};H(not D,f"env={A} has no settings {', '.join(D)}: see --help");return C
def AD(env,argv):
	F=env;G,I=B4().parse_known_args(argv);D,Q,B=Ax(V),V.__annotations__,[];R=[A for A in I if A.startswith('-')]
	for J in R or I:K=difflib.get_close_matches(J,['--'+A.replace('_','-')for A in D],1);B.append(f"unknown argument {J}: did you mean {K[0]if K else'--help'}?")
	S={A:F[A.upper()]for A in D if A.upper()in F};T={'file':B5(G.env)if G.env else{},'env':S};C,L={},dict.fromkeys(D,'default')
	for(M,U)in(T|{'flag':G.__dict__}).items():
		for(A,N)in U.items():
			try:
				if A!='env':C[A]=B3(D[A],str(N));L[A]=M
			except(h,Am):W=Q[A].replace('Literal','one of ');B.append(f"{A}={N} ({M}) is no {W}")
	if'train_batch_tokens'not in C:O=E(1,C.get('train_seq_len',2048));X=98304*int(F.get('WORLD_SIZE',1));C['train_batch_tokens']=E(1,X//O)*O
	try:Y=V(**C)
	except P as Z:B.append(str(Z))
	H(not B,'\n'.join(B));return Y,L
B6=At(seconds=300)
class AE(g):
	rank:int;world_size:int;device:A.device;dtype:A.dtype;compiles:bool=False
	@classmethod
	def start(J,hp:V)->AE:
		K,D=int(S.environ.get('RANK',0)),int(S.environ.get('WORLD_SIZE',1));B,E,C=A.device('cpu'),'gloo',A.float32
		if A.cuda.is_available():
			F,G=int(S.environ.get('LOCAL_RANK',0)),A.cuda.device_count();H(F<G,f"nproc_per_node: only {G} GPUs are visible, start as many");B,E=A.device('cuda',F),'cpu:gloo,cuda:nccl';A.cuda.set_device(B)
			if A.cuda.get_device_capability()>=(8,0):C=A.bfloat16
		if D>1:b.init_process_group(E,timeout=B6)
		I=hp.compile=='on'or hp.compile=='auto'and B.type=='cuda';A.compiler.set_stance('default'if I else'force_eager');C=C if hp.dtype=='auto'else Z(A,hp.dtype);return J(K,D,B,C,I)
	@d
	def is_main(self)->bool:return self.rank==0
	@d
	def on_gpu(self)->bool:return self.device.type=='cuda'
	def sum_(A,x):
		if A.world_size>1:b.all_reduce(x)
		return x
	def barrier(B):B.sum_(A.zeros(1,device=B.device)).item()
	def from_main(C,value):
		B=[value]
		if C.world_size>1:b.broadcast_object_list(B,src=0,device=A.device('cpu'))
		return B[0]
	def share(A,count):return e(*(B*count//A.world_size for B in(A.rank,A.rank+1)))
def AF(value):
	A=value
	if m(A,tuple|list):return','.join(map(AF,A))or'none'
	if m(A,float):return f"{A:.6g}"
	B='!"#$&\'()*+,-./:;<=>?@[]^_`{|}~';return quote(str(A),safe=B,errors='surrogateescape')or'none'
class AG:
	def __init__(A,path,resume=False):
		C=resume;B=path;A.path,A.file,A.since=B,None,K.perf_counter();A.has_results=C
		if B is None:return
		try:B.parent.mkdir(parents=True,exist_ok=True);A.file=B.open('a'if C else'x',encoding='utf-8');w.flock(A.file,w.LOCK_EX|w.LOCK_NB)
		except BlockingIOError:raise P(f"run_id: another process writes {B}: wait for its end")from None
		except R as D:E=f"output_dir: cannot write {B} ({D.strerror}): choose another folder";raise P(E)from None
		A.file.write('\n'if A.file.tell()else'')
	def event(A,D='',/,**E):
		B=' '.join(filter(None,[D,*(f"{A}:{AF(B)}"for(A,B)in E.items())]))
		for C in(T.stdout,A.file)if A.file else():
			with q(R):u('\r\x1b[K'+B if C.isatty()else B,file=C,flush=True)
	def progress(A,text):
		if A.file and T.stdout.isatty():u(f"\r{text}[K",end='',flush=True)
	def phase(A,name):B=K.perf_counter();A.event('phase',name=name,seconds=f"{B-A.since:.3f}");A.since=B
	def abandon(A,error):
		B=error;A.event('failed',text=(str(B)or repr(B)).splitlines()[0])
		if A.file and not A.has_results:A.path.unlink(missing_ok=True)
class B7:
	def __init__(A):A.noted,A.advice,A.farewell=0,'',''
	def install(B):
		for A in(O.SIGTERM,O.SIGINT,O.SIGHUP):
			if O.getsignal(A)!=O.SIG_IGN:O.signal(A,B.handle)
	def handle(A,number,frame):
		B=number;C=O.Signals(B).name
		if A.noted or not A.advice:raise SystemExit(f"stopped by {C}{A.farewell}")
		A.noted=B;S.write(2,f"\n{C}: {A.advice}\n".encode())
B8,B9,BA=20240520,1,256
def AH(path):A=path;B,C=A.stat().st_size,4*BA;D=F.fromfile(A,dtype='<i4',count=3).tolist();E=[B8,B9,(B-C)/2];G=f"data shard {A} of {B} bytes begins with {D} instead of {E}";H(B>C and D==E,f"{G}: download or prepare it again");return F.memmap(A,dtype='<u2',mode='r',offset=C,shape=(D[2],))
def BB(data_path,split):B=split;A=data_path;C=o(A.glob(f"fineweb_{B}_*.bin"));D='run data/download_fineweb.py or data/prepare_text.py, or set DATA_PATH';H(bool(C),f"data_path={A} holds no fineweb_{B}_*.bin: {D}");return C
def BC(paths):
	A=i.sha256()
	for C in paths:B=AH(C);A.update(f"{C.name}:{D(B)}:".encode());A.update(B[:4096].tobytes()+B[-4096:].tobytes())
	return A.hexdigest()[:16]
def A0(hp):A=L(hp.data_path)/'tokenizer.model';B=A if A.exists()else'data/tokenizers/fineweb_1024_bpe.model';return L(hp.tokenizer_path or B)
def BD(path):
	A,B=AB.SentencePieceProcessor(),f"tokenizer_path={path}"
	try:A.LoadFromSerializedProto(path.read_bytes())
	except(An,R):raise P(f"{B} is no SentencePiece model: set TOKENIZER_PATH")from None
	C=not A.IsUnknown(A.PieceToId('▁'));H(C,f"{B} has no piece for the space, so that bytes would be miscounted");return A
def BE(path,data_path):
	A=None
	with q(R,h,Am,TypeError,Ao):A=x.loads((data_path/'manifest.json').read_bytes())['tokenizer']['sha256']
	B=A in(None,i.sha256(path.read_bytes()).hexdigest());H(B,f"tokenizer_path={path} is not the one that manifest.json names: use that one")
class AI:
	def __init__(E,tokenizer,device):
		B=tokenizer;G=[]
		for C in range(B.vocab_size()):H=B.IdToPiece(C);F=not(B.IsControl(C)or B.IsUnknown(C)or B.IsUnused(C));I=1 if B.IsByte(C)else D(H.removeprefix('▁').encode());G.append([I*F,H.startswith('▁')*F,F])
		J=A.tensor(G,dtype=A.int32,device=device);E.length,E.space,E.inner=J.T.contiguous().unbind()
	def of(A,previous,target):B=target;return A.length[B]+A.space[B]*A.inner[previous]
class AJ:
	def __init__(A,shards,hp,runtime):G=runtime;C=shards;A.shards,A.hp,A.runtime=C,hp,G;B,A.share=hp.train_seq_len,G.share(hp.batch_seqs);A.shape=A.share.stop-A.share.start,B+1;I=[E(0,D(A)//B-1)for A in C];A.first_window=F.cumsum([0,*I]);A.epoch_windows,A.epoch=int(A.first_window[-1]),-1;J=f"data_path: no training shard holds two windows of train_seq_len={B} tokens";H(A.epoch_windows>0,f"{J}: prepare more text or lower train_seq_len")
	def window(A,index):
		B,(C,I)=A.hp.train_seq_len,divmod(index,A.epoch_windows)
		if C!=A.epoch:
			D=F.random.default_rng([A.hp.seed,C]);A.epoch,A.phase,A.order=C,0,F.arange(A.epoch_windows)
			if A.hp.shuffle:A.phase=int(D.integers(B));D.shuffle(A.order)
		E=A.order[I];G=F.searchsorted(A.first_window,E,side='right')-1;H=int(A.phase+(E-A.first_window[G])*B);return A.shards[G][H:H+B+1]
	def batch(B,step):
		C=A.empty(B.shape,dtype=A.int32,pin_memory=B.runtime.on_gpu)
		for(D,E)in Q(C.numpy(),range(B.share.start,B.share.stop),strict=True):D[:]=B.window(step*B.hp.batch_seqs+E)
		return C.to(B.runtime.device,non_blocking=True)
class BF(g):loader:AJ|None;val_tokens:F.ndarray;token_bytes:AI;facts:list[dict[str,a]]
def BG(hp,runtime):
	G=runtime;B=hp;K,I,P,Q=A0(B),0,[],None;R,S,T=BD(K),L(B.data_path),B.train_seq_len;BE(K,S);J=R.vocab_size();M=f"tokenizer_path={K} has {J} pieces";V=B.vocab_size in(None,J);H(V,f"{M}, not vocab_size={B.vocab_size}: use one of that size");B=y(B,vocab_size=J,tokenizer_path=str(K))
	for N in('val',)if B.evaluate else('train','val'):
		U=BB(S,N);C=[AH(A)for A in U];W={'shards':D(C),'tokens':sum(map(D,C))};P.append({'split':N,**W,'fingerprint':BC(U)});X=C[G.rank%D(C)::G.world_size];I=E(I,*(int(A.max())for A in X))
		if N=='train':Q=AJ(C,B,G)
	Y,Z=G.sum_(A.tensor([I>=J,I>=J/2]).int());H(Y==0<Z,f"{M}, the shards' largest token is {I}: use the shards' tokenizer");O=F.concatenate(C);M=f"data_path: {D(O)} validation tokens are not more than a window of {T}";H(D(O)>T,f"{M}: prepare more text or lower train_seq_len");return B,BF(Q,O,AI(R,G.device),P)
AK=1e-06
BH=[*(r.CUDNN_ATTENTION,r.FLASH_ATTENTION),*(r.EFFICIENT_ATTENTION,r.MATH)]
BI=tuple[C,C,int]
BJ=tuple[C,C]
def W(function):B=function;C=AA(N(A.compile,B,dynamic=False,fullgraph=True));return wraps(B)(lambda*A,**B:C()(*A,**B))
def k(x):A._dynamo.maybe_mark_dynamic(x,0);return x
class BK(g):qkv:C;out:C;mlp_up:C;mlp_down:C;resid_mix:C;q_gain:C;xsa:bool
def l(x):return J.rms_norm(x,(x.size(-1),),eps=AK)
def BL(hp):C,B=hp.train_seq_len,hp.rope_dims;F=E(1.,C/1024)**(B/E(1,B-2));G=(10000*F)**-(A.arange(0,B,2).float()/E(1,B));D=A.outer(A.arange(C).float(),G);H=A.zeros(C,hp.head_dim-B);I,J=(A.cat([B*D,D,H],1)for B in(1,-1));return I.cos(),J.sin()
def AL(x,cos,sin,half):D=half;C=sin;B=cos;a,b,E=x.split([D,D,x.size(-1)-2*D],dim=-1);B,C=(A[:,None].to(x.dtype)for A in(B,C));return x*B+A.cat([b,a,E],dim=-1)*C
class BM(A.autograd.Function):
	@v
	def forward(ctx:a,x:C,gain:C,cos:C,sin:C,half:int)->tuple[C,...]:A=gain;C,B=D(A),(x.size(2)-D(A))//2;A=J.pad(A,(0,B),value=1.)[:,None];ctx.save_for_backward(x,A,cos,sin);ctx.half=half;E,F=x.split([C+B,B],dim=2);G,H=(A*AL(l(E),cos,sin,half)).split([C,B],dim=2);return G,H,F
	@v
	def backward(ctx:a,dq:C,dk:C,dv:C)->tuple[C|None,...]:B,E,J,K=ctx.saved_tensors;F=A.promote_types(B.dtype,A.float32);B,C=B[:,:,:D(E)].to(F),A.cat([dq,dk],dim=2);C=AL(C,J,-K,ctx.half).to(F);G=(B.square().mean(-1,keepdim=True)+AK).rsqrt();H=G*B;I=(C*H).sum(-1,keepdim=True);L=E*G*(C-H*I/B.size(-1));M=I.sum((0,1,3))[:dq.size(2)].to(E.dtype);return A.cat([L.to(dv.dtype),dv],dim=2),M,None,None,None
def BN(q,k,v):
	if q.device.type=='cpu':k,v=(A.repeat_interleave(q.size(2)//A.size(2),dim=2)for A in(k,v))
	q,k,v=(A.transpose(1,2)for A in(q,k,v));A=q.size(1)!=k.size(1);B=J.scaled_dot_product_attention(q,k,v,is_causal=True,enable_gqa=A);return B.transpose(1,2)
def BO(y,v):y=y.unflatten(2,(v.size(2),-1));v=J.normalize(v,dim=-1).unsqueeze(3);return(y-(y*v).sum(-1,keepdim=True)*v).flatten(2,3)
def BP(x,layer,value,rope):
	D=value;A=layer;x=J.linear(x,A.qkv).unflatten(-1,(-1,A.out.size(0)//A.q_gain.numel()));E,F,B=BM.apply(x,A.q_gain,*rope)
	if D is not None:B=B+D[1]*D[0].view_as(B)
	C=BN(E,F,B);C=BO(C,B)if A.xsa else C;return J.linear(C.flatten(2),A.out)
def BQ(x,layer):
	A=layer
	if Af(x.device,x.dtype,A.mlp_up.shape):return Bv.apply(x.flatten(0,1),A.mlp_up,A.mlp_down).view_as(x)
	return J.linear(J.leaky_relu(J.linear(x,A.mlp_up),.5).square(),A.mlp_down)
def AM(x,layer,value,skip,x0,rope):
	B=skip;A=layer
	if B is not None:x=x+B[1]*B[0]
	x=A.resid_mix[0]*x+A.resid_mix[1]*x0;x=x+BP(l(x),A,value,rope);return x+BQ(l(x),A)
BR=W(AM)
@W
def BS(x:C,rows:list,x0:C,rope:BI,keep:int)->list[C]:return[(x:=AM(x,*A,x0,rope))for A in rows][D(rows)-keep:]
def BT(x,rows,x0,rope,keep=1):
	B=rows
	if A.is_grad_enabled():
		for D in(x,x0,*(A[0]for B in B for A in B[1:]if A)):k(D)
		return[x,*BS(x,B,x0,rope,keep)]
	C=[x.view_as(x)]
	for E in B:C.append(BR(C[-1],*E,x0,rope))
	return[x,*C[1:]]
def BU(ids,num_rows):B=num_rows;C=A.bitwise_xor(36313*ids[:,1:],27191*ids[:,:-1])%(B-1);return J.pad(C,(1,0),value=B-1)
@W
def BV(ids:C,table:C,bigram:tuple[C,...],gate:C,dtype:A.dtype)->C:
	C=bigram;B=dtype;A=J.embedding(ids,table.to(B))
	if C:E,G,H=(A.to(B)for A in C);I=J.embedding(BU(ids,D(E)),E);A=A+H*J.linear(I,G)
	A,F=l(A),gate.sigmoid().to(B);return(1-F)*A+F*J.pad(A,(0,0,1,0))[:,:-1]
def AN(x,table,softcap):B=softcap;C=J.linear(l(x),table.to(x.dtype)).float();return B*A.tanh(C/B)
@W
def BW(x:C,targets:C,table:C,softcap:float)->C:A=AN(x,table,softcap);return J.cross_entropy(A,targets.long(),reduction='none')
class BX(g):jacobian_proxy:C;growth:C;update:C;feedback:C
@W
def BY(h:C,U:C,V:C,d:C)->tuple[C,C]:A=d.to(h.dtype)*(h@V.to(h.dtype)@U.to(h.dtype).T);return A,h+A
@W
def BZ(h:C,z:C,core_z:C,scale:C)->C:return h+scale.to(h.dtype)*(core_z-z)
@W
def AO(h:C,h_next:C,c:C|None)->tuple[C,C]:D=h_next;B=N(A.linalg.vector_norm,dim=(1,2),dtype=A.float32);C=B(h)+1e-06;E=B(D-h)/C;F=A.zeros_like(C)if c is None else B(c)/C;G=A.stack([B(D)/C,E,F]);return J.relu(E-1).square(),G.mean(1).detach()
def Ba(h,core,num_passes,scales,feedback):
	G=feedback;F=scales;C,B=None,core(h);H=[AO(h,B,C)]
	for I in range(1,num_passes):
		h=E=B
		if G:C,E=BY(h,*G)
		B=BZ(h,E,core(E),F[M(I,D(F))-1]);H.append(AO(h,B,C))
	J,K=Q(*H,strict=True);return B,BX(A.stack(J).sum(0),*A.stack(K).unbind(1))
class I(g):shape:tuple[int,...];group:str;start:Ar[[C],a]
def A1(bank):
	for A in bank:U.init.orthogonal_(A)
def A2(hp):
	A=hp;E,B,L,O,K=A.num_layers,A.model_dim,A.mlp_dim,A.vocab_size,A.bigram_dim;P,Q=A.num_kv_heads*A.head_dim,A.max_passes-1;S,R=M(A.core_start,E-A.core_end),D(A.ve_layer_ids);F,G=U.init.zeros_,U.init.ones_;H,J=N(N,U.init.normal_),N(N,U.init.constant_);C={'qo_bank':I((2*E,B,B),'muon',lambda w:A1(w.zero_()[:E])),'kv_bank':I((2*E,P,B),'muon',A1),'mlp_up_bank':I((E,L,B),'muon',A1),'mlp_down_bank':I((E,B,L),'muon',F),'tok_emb':I((O,B),'table',H(std=A.tied_embed_init_std)),'smear_gate':I((B,),'scalar',F),'resid_mix':I((E,2,B),'scalar',lambda w:w.zero_()[:,0].fill_(1)),'attn_scale':I((E,B),'scalar',G),'mlp_scale':I((E,B),'scalar',G),'q_gain':I((E,A.num_heads),'scalar',J(val=A.qk_gain_init)),'skip_weight':I((S,B),'scalar',G)}
	if A.bigram_vocab_size:C['bigram_table']=I((A.bigram_vocab_size,K),'table',F);C['bigram_proj']=I((B,K),'projection',H(std=K**-.5));C['bigram_scale']=I((),'scalar',J(val=.05))
	if R:C['ve_table']=I((O,A.ve_dim),'table',H(std=.01));C['ve_proj']=I((P,A.ve_dim),'projection',F);C['ve_scale']=I((),'scalar',J(val=.1));C['ve_layer_scale']=I((R,),'scalar',G)
	C['residual_scale']=I((Q,),'scalar',J(val=A.residual_scale_init))
	if Q and A.feedback_mode!='none':C['feedback_U']=I((B,A.feedback_rank),'scalar',F);C['feedback_V']=I((B,A.feedback_rank),'scalar',H(std=B**-.5));C['feedback_d']=I((B,),'scalar',G)
	return C
class AP(U.Module):
	@A.no_grad()
	def __init__(self,hp:V,dtype:A.dtype=A.float32)->None:
		B=self;super().__init__();B.hp,B.dtype=hp,dtype
		for(C,D)in A2(hp).items():B.register_parameter(C,U.Parameter(A.empty(D.shape)));D.start(B.get_parameter(C))
		E=A.arange(1,hp.num_layers+1).float().rsqrt()
		for(C,F)in Q(('cos','sin','depth'),(*BL(hp),E),strict=True):B.register_buffer(C,F,persistent=False)
	def parameters_of(A,part):return tuple(B for(A,B)in A.named_parameters()if A.startswith(part))
	def layers(B,qat_floor):
		F=qat_floor;C,D=B.hp,B.hp.num_layers;I=[C.core_start,C.core_end-C.core_start,D-C.core_end]
		def E(bank):
			B=bank.unflatten(0,(-1,D))
			if F is None:return B
			E,C,G=B.split(I,dim=1);H=Bn(k(C.flatten(0,2)),F).view_as(C);return A.cat([E,H,G],dim=1)
		(J,out),(K,L)=E(B.qo_bank),E(B.kv_bank);[M],[N]=E(B.mlp_up_bank),E(B.mlp_down_bank);G=B.depth[:,None,None];H=G*A.cat([J,K,L],dim=1),B.attn_scale[...,None]*out;H+=G*M,B.mlp_scale[...,None]*N;O=[A.to(B.dtype).unbind()for A in(*H,B.resid_mix,B.q_gain)];P=[A>=D-C.xsa_last_n and not C.core_start<=A<C.core_end for A in range(D)];return[BK(*A)for A in Q(*O,P,strict=True)]
	def value_embeddings(A,ids):
		B:list[BJ|None]=[None]*A.hp.num_layers
		if A.hp.ve_layer_ids:
			C=J.embedding(ids,A.ve_table.to(A.dtype))@A.ve_proj.to(A.dtype).T;D=(A.ve_scale*A.ve_layer_scale).to(A.dtype).unbind()
			for(E,F)in Q(A.hp.ve_layer_ids,D,strict=True):B[E]=C,F
		return B
	def hidden(A,ids,num_passes,qat_floor=None):
		C=ids;B,E=A.hp,C.size(1);H=A.cos[:E],A.sin[:E],B.rope_dims//2;I,J=A.parameters_of('bigram_'),A.parameters_of('feedback_');F=BV(k(C),A.tok_emb,I,A.smear_gate,A.dtype);K,L=A.layers(qat_floor),A.value_embeddings(C)
		def D(x,start,end,skips=(),keep=1):A=e(start,end);B=Av(K[A],L[A],skips);return BT(x,[*B],F,H,keep)
		G=D(F,0,B.core_start,keep=B.core_start);M=lambda z:D(z,B.core_start,B.core_end)[-1];N,O=Ba(G[-1],M,num_passes,A.residual_scale,J);P=Q(G[:0:-1],A.skip_weight.to(A.dtype).unbind(),strict=False);return D(N,B.core_end,B.num_layers,[*P])[-1],O
	def logits(A,ids,num_passes):B,C=A.hidden(ids,num_passes);return AN(B,A.tok_emb,A.hp.logit_softcap)
	def forward(B,ids,targets,num_passes,qat_floor=None,score_last=None):
		C=score_last;A=targets;D,E=B.hidden(ids,num_passes,qat_floor)
		if C:D,A=D[:,-C:],A[:,-C:]
		F=k(D.flatten(0,1)),k(A.flatten());G=BW(*F,B.tok_emb,B.hp.logit_softcap);return G.view_as(A),E
X='mlp_up_bank','mlp_down_bank','qo_bank','kv_bank'
AQ='table','projection','scalar'
class AR:
	ALIGNMENT=64
	def __init__(B,model,world_size=1):
		H=model;C,K=dict(H.named_parameters()),A2(H.hp);B.shapes={A:B.shape for(A,B)in C.items()};(B.places):dict[str,e]={};(B.spans):dict[str,e]={};E=0
		for I in(*X,*AQ):
			L=E
			for D in[A for A in C if I in(A,K[A].group)]:
				B.places[D]=e(E,E+C[D].numel());J=B.ALIGNMENT
				if I in X:J=world_size*G.lcm(C[D][0].numel(),B.ALIGNMENT)
				E+=G.ceil(C[D].numel()/J)*J
			B.spans[I]=e(L,E)
		assert n(B.places)==n(C),'every parameter is optimized exactly once';B.banks_end=B.spans['table'].start;B.data,B.grad=A.zeros(2,E,device=H.tok_emb.device).unbind()
		for(D,F)in C.items():F.data=B.data[B.places[D]].view(F.shape).copy_(F.data);F.grad=B.grad[B.places[D]].view(F.shape)
	def shard(A,flat,bank,runtime):B=runtime;C=flat[A.spans[bank]].view(-1,*A.shapes[bank][1:]);return C.chunk(B.world_size)[B.rank]
	def gather(A,flat,bank,runtime):B=A.shard(flat,bank,runtime).view(-1);return b.all_gather_into_tensor(flat[A.spans[bank]],B,async_op=True)
	def named(A,flat):B={B:A for(B,A)in A.places.items()if A.stop<=D(flat)};return{A:flat[B[A]].view(C)for(A,C)in A.shapes.items()if A in B}
	def whole(A,span):B=U.Parameter(A.data[span]);B.grad=A.grad[span];return B
def Bb(g,dtype,steps=5):
	a,b,E=3.4445,-4.775,2.0315;D=g.size(-2)>g.size(-1);B=(g.mT if D else g).to(dtype);B=B/(B.norm(dim=(-2,-1),keepdim=True)+1e-07)
	for F in range(steps):C=B@B.mT;B=A.baddbmm(B,A.baddbmm(C,C,C,beta=b,alpha=E),B,beta=a)
	return B.mT if D else B
class AS:
	def __init__(D,flat,hp,runtime):E=runtime;C=hp;B=flat;D.flat,D.hp,D.runtime=B,C,E;D.momentum=A.zeros_like(B.data[:B.banks_end]);D.bank_grads={A:B.shard(B.grad,A,E)for A in X};D.rest=B.grad[B.banks_end:];F=[(C.tied_embed_lr,C.adam_wd),(C.scalar_lr,C.adam_wd),(C.scalar_lr,.0)];G=[{'params':[B.whole(B.spans[A])],'base_lr':C,'weight_decay':D}for(A,(C,D))in Q(AQ,F,strict=True)];D.adam=A.optim.AdamW(G,lr=.0,betas=(C.beta1,C.beta2),fused=True)
	def reduce(B):
		C,D=B.flat,B.runtime
		if D.world_size>1:
			F=[b.all_reduce(B.rest,async_op=True)]
			for E in X:G=A.empty_like(C.shard(B.momentum,E,D));B.bank_grads[E],H=G,C.grad[C.spans[E]];F.append(b.reduce_scatter_tensor(G.view(-1),H,async_op=True))
			for I in F:I.wait()
		J=A.stack([A.square().sum()for A in B.bank_grads.values()]).sum();return(D.sum_(J)+B.rest.square().sum()).sqrt()
	@A.no_grad()
	def step(self,norm:C,lr_scale:float,momentum:float)->None:
		C=lr_scale;A=self;D=[];E=(A.hp.grad_clip_norm/(norm+1e-06)).clamp(max=1.)
		for B in X:
			A.update_rows(B,A.bank_grads[B]*E,C,momentum)
			if A.runtime.world_size>1:D.append(A.flat.gather(A.flat.data,B,A.runtime))
		A.rest.mul_(E)
		for F in A.adam.param_groups:F['lr']=F['base_lr']*C
		A.adam.step()
		for G in D:G.wait()
	def update_rows(B,bank,grad,lr_scale,momentum):F=momentum;C=grad;D=B.flat.shard(B.flat.data,bank,B.runtime);I=B.flat.shard(B.momentum,bank,B.runtime).mul_(F).add_(C);C=J.normalize(C.add_(I,alpha=F),dim=-1,eps=1e-07);K=A.bfloat16 if D.is_cuda else A.float32;L=Bb(C,K);M=G.sqrt(E(1.,D.size(-2)/D.size(-1)));H=B.hp.matrix_lr*lr_scale;D.mul_(1-H*B.hp.muon_wd).add_(L,alpha=-H*M)
class Bc:
	def __init__(B,hp,weights):C=weights;B.hp,B.weights=hp,C;B.ema=C.clone()if'ema'in hp.weight_average else None;B.swa=A.zeros_like(C)if'swa'in hp.weight_average else None;B.samples,B.last_progress,B.last_sample=0,.0,-1.
	def update(A,progress,swa):
		B=progress;C,A.last_progress=B-A.last_progress,B
		if A.ema is not None:A.ema.lerp_(A.weights,-G.expm1(-C/A.hp.ema_frac))
		if A.swa is not None and swa and B-A.last_sample>=A.hp.swa_frac:A.samples,A.last_sample=A.samples+1,B;A.swa.lerp_(A.weights if A.ema is None else A.ema,1/A.samples)
	def result(A):return A.swa if A.samples else A.weights if A.ema is None else A.ema
class AT(g):num_passes:int;qat:bool;swa:bool;lr_scale:float;momentum:float
def A3(hp,step,progress):B=progress;A=hp;G=[C for(A,C)in A.growth if A<=B][-1];C=M(1.,E(.0,1-B)/A.warmdown_frac);F=M(1.,B/A.muon_momentum_warmup_frac);D=(1-F)*A.muon_momentum_warmup_start+F*A.muon_momentum;H=1-B/E(1,step)/A.muon_momentum_frac;D=M(D,E(.85,H));I,J=C<A.late_qat_threshold,C<A.swa_lr_scale;return AT(G,I,J,C,D)
def s():return A._dynamo.utils.counters['stats']['unique_graphs']
class A4:
	def __init__(A,sequences,log):A.sequences,A.log=sequences,log
	def run(B,work):
		while True:
			try:return work(B.sequences)
			except A.OutOfMemoryError:C="the GPU's memory does not hold one sequence: lower train_seq_len";H(B.sequences>1,f"{C}, or make the model smaller")
			B.sequences//=2;A.cuda.empty_cache();B.log.event('out_of_memory',sequences_at_once=B.sequences)
def AU(rows,most):A=rows;return list(A.tensor_split(G.ceil(D(A)/most)))if D(A)else[]
class Bd:
	def __init__(A,trainer):B=trainer;A.hp,A.runtime,A.stop=B.hp,B.runtime,B.stop;A.cap=A.hp.max_wallclock_seconds or G.inf;A.progress,A.interrupted=B.average.last_progress,False;A.recent=[.0];A.runtime.barrier();A.last=A.last_checkpoint=K.perf_counter();A.started=A.last-B.elapsed
	def elapsed(A):return K.perf_counter()-A.started
	def read(B,step):C,H=K.perf_counter(),B.hp.iterations;B.recent=[*B.recent[-15:],C-B.last];D,B.last=C-B.started+B.recent[-1]*B.runtime.on_gpu,C;I=D>=B.cap or D+E(B.recent)>B.cap;L=B.hp.checkpoint_seconds or G.inf;F=C-B.last_checkpoint>=L and B.cap-D>=L;J=[float(A)*B.runtime.is_main for A in(D/B.cap,I,F)];J=A.tensor([*J,B.stop.noted],dtype=A.float64);O,I,F,N=B.runtime.sum_(J).tolist();B.last_checkpoint=C if F else B.last_checkpoint;B.interrupted=N>0;P=.0 if H is None else step/H if H else 1.;B.progress=E(B.progress,M(O,1.),P);return 1. if I or N else B.progress,F>0
	def forecast(A,passes):B=A.elapsed()*(1/E(A.progress,1e-09)-1);return f"{passes} passes, {1000*A.recent[-1]:.0f} ms a step, {B:.0f} s left"
	def fields(B,step):A=1000*B.elapsed();return{'train_time':f"{A:.0f}ms",'step_avg':f"{A/E(1,step):.2f}ms"}
class Be:
	def __init__(B,model,data,runtime,log,stop):D=runtime;C=model;B.hp,B.model,B.data,B.runtime=C.hp,C,data,D;B.log,B.stop=log,stop;B.fitting=A4(B.hp.micro_batch_tokens//B.hp.train_seq_len,log);B.flat=AR(C,D.world_size);B.optimizer=AS(B.flat,B.hp,D);B.average=Bc(B.hp,B.flat.data);B.step,B.elapsed=0,.0;(B.plan):AT|None=None;B.phase_start=0;(B.floor_index):int|None=None;(B.norm_before):tuple[a,A.cuda.Event|None]=(.0,None)
	def accumulate(A,batch,passes,floor):return A.fitting.run(N(A.accumulate_parts,batch,passes,floor))
	def accumulate_parts(B,batch,passes,floor,at_once):
		F=passes;C=B.hp;B.flat.grad.zero_();G=A.zeros(3+3*F,device=B.runtime.device)
		for E in AU(batch,at_once):H,I=E[:,:-1],E[:,1:];M,J=B.model(H,I,F,floor);K,L=M.sum(),J.jacobian_proxy.sum();N=C.jacobian_proxy_weight*L/C.batch_seqs;(K/C.train_batch_tokens+N).backward();O=B.data.token_bytes.of(H,I).sum();P=A.stack([K.detach(),O,L.detach()]);G+=A.cat([P,D(E)*A.cat(J[1:])])
		return G
	def warm_up(C,evaluator):
		K=evaluator;B,G,F,Q=C.hp,C.flat,C.runtime,C.flat.data.clone();R=A.Generator().manual_seed(B.seed);L=N(A.randint,B.vocab_size,generator=R,dtype=A.int32);M,S=AS(G,B,F),A.ones((),device=F.device);O=o({A for(B,A)in B.growth});T=(None,S)if B.late_qat_threshold>0 else(None,);I=[(A,B)for A in O for B in T];H=E(B.warmup_steps,D(I))if B.warmup_steps else 0
		for P in range(H):C.log.progress(f"warm-up: step {P+1} of {H}");U=L(C.data.loader.shape).to(F.device);C.accumulate(U,*I[P*D(I)//H]);M.step(M.reduce(),1.,.9)
		if H and F.compiles:V=L((B.ttt_chunk_tokens+2*B.train_seq_len,)).numpy();W=C.data._replace(val_tokens=V);J=Ae(B,W,F,AG(None));J.scoring,J.training=K.scoring,K.training;J.run_all(C.model,G,O[-1])
		G.data.copy_(Q);G.grad.zero_()
	def train(B,evaluator,checkpoints,until=1.):
		D,E,C,J=B.hp,B.log,Bd(B),s();E.has_results,F=True,''
		while True:
			G,L=C.read(B.step)
			if G>=until:break
			if L:B.elapsed=C.elapsed();AY(B,checkpoints);C.last=K.perf_counter()
			M,N=B.take_step(G)
			if B.step%D.train_log_every==0 or B.step in(1,10):F=B.log_step(M,N,C)
			if D.val_loss_every and B.step%D.val_loss_every==0:B.runtime.barrier();O,P=K.perf_counter(),B.plan.num_passes;evaluator.run('validation',B.model,D.train_seq_len,P,step=B.step);C.last=K.perf_counter();C.started+=C.last-O
			E.progress(f"step {B.step}, {F}, {C.forecast(B.plan.num_passes)}")
		B.check_norm(None);B.runtime.barrier();B.elapsed,H=C.elapsed(),0
		if B.runtime.on_gpu:H=A.cuda.max_memory_allocated()>>20
		I={'graphs_compiled_after_start':s()-J};I|={'peak_memory_mib':H,'interrupted':int(C.interrupted)};E.event('stop',step=B.step,**C.fields(B.step),**I);return C.interrupted
	def take_step(B,progress):
		E=progress;D,C=B.plan,A3(B.hp,B.step,E);B.plan,F,H=C,{'step':B.step,'progress':E},None
		if D is None or C.num_passes!=D.num_passes:B.phase_start=B.step;B.log.event('progressive_passes',**F,num_passes=C.num_passes)
		if C.swa and not(D and D.swa)and B.average.swa is not None:B.log.event('swa',**F)
		if C.qat and B.floor_index is None:J=A7(B.flat.named(B.flat.data),Ah(B.hp));B.floor_index=I=B.runtime.from_main(J);B.log.event('late_qat',**F,floor_index=I,floor=c(I))
		if C.qat:H=A.full((),c(B.floor_index),device=B.runtime.device)
		K=B.accumulate(B.data.loader.batch(B.step),C.num_passes,H);G=B.optimizer.reduce();B.optimizer.step(G,C.lr_scale,C.momentum);B.average.update(E,C.swa);B.step+=1;B.check_norm(G);return K,G
	def check_norm(B,norm):
		C=norm;(E,D),B.norm_before=B.norm_before,(.0,None)
		if D is not None:D.synchronize()
		F=B.step-(C is not None)
		if not G.isfinite(E):H=f"step {F}: the gradient's norm is {float(E)}, the run diverged";raise Ap(f"{H}: lower matrix_lr or residual_scale_init")
		if C is not None:I=C.detach().to('cpu',non_blocking=True);D=A.cuda.current_stream().record_event()if C.is_cuda else None;B.norm_before=I,D
	def log_step(A,sums,norm,clock):C,H,D=A.hp,A.plan,A.step;J,M,N,*I=A.runtime.sum_(sums).tolist();I=(F.array(I).reshape(3,-1)/C.batch_seqs).tolist();K,L=J/C.train_batch_tokens,J/G.log(2)/E(1,M);B={'step':f"{D}/{C.iterations}"if C.iterations else D};B|={'train_loss':f"{K:.4f}",'train_bpb':f"{L:.4f}"};B|={'passes':H.num_passes,'qat':int(H.qat),'lr_scale':H.lr_scale};A.log.event(**B,grad_norm=norm.item(),**clock.fields(D));B={'step':D,'jacobian_proxy':N/C.batch_seqs};B|=Q(('growth','update','feedback_norm'),I,strict=True);B['residual_scale']=A.model.residual_scale.tolist();A.log.event('passes',**B);return f"loss {K:.3f}, {L:.3f} bits per byte"
	def average_weights(A):
		A.flat.data.copy_(A.average.result());E,F=A.hp.weight_average,A.average.samples;A.log.event('weight_average',kind=E,swa_samples=F);B=(A.plan or A3(A.hp,0,.0)).num_passes;C,D=A.hp.eval_passes or B,A.step-A.phase_start
		if C>B or A.phase_start and D<A.step/100:G=f"scored with {C} passes, and only the last {D} of {A.step} steps";A.log.event('warning',text=f"{G} had {B}")
		return C
AV='step','elapsed','phase_start','floor_index'
AW='samples','last_progress','last_sample'
def AX(trainer):A=trainer;B,C=A.hp,A.average;F='seed','train_batch_tokens','shuffle','weight_average';D=B.architecture()|{A:Z(B,A)for A in F};D|={'eval_passes':None,'data':A.data.facts[0]['fingerprint']};E={'data':A.flat.data,'momentum':A.optimizer.momentum};E|={'ema':C.ema,'swa':C.swa};return D,{B:A for(B,A)in E.items()if A is not None}
def AY(trainer,folder):
	E=folder;B=trainer;I,C,J=B.flat,B.runtime,B.optimizer.momentum
	if C.world_size>1:
		for K in[I.gather(J,A,C)for A in X]:K.wait()
	if not C.is_main:return C.from_main(None)
	L,M=AX(B);F={'settings':L,'adam':B.optimizer.adam.state_dict()};F|={A:Z(B,A)for A in AV};F|={A:Z(B.average,A)for A in AW};F['tensors']={A:I.named(B.to('cpu',copy=True))for(A,B)in M.items()};A.save(F,(N:=io.BytesIO()));G,H=E/f"step_{B.step:08d}.pt",N.getvalue()
	try:
		E.mkdir(parents=True,exist_ok=True);A9(G,i.sha256(H).digest()+H);O=o(E.glob('step_*.pt'),key=lambda other:(other<=G,other))
		for P in(*O[:-2],*E.glob('step_*.tmp')):P.unlink()
	except R as Q:B.log.event('checkpoint_failed',path=G,reason=Q.strerror);return C.from_main(False)
	B.log.event('checkpoint',step=B.step,path=G,bytes=32+D(H));return C.from_main(True)
def Bf(folder,runtime,log):
	B=runtime
	for D in B.from_main(o(folder.glob('step_*.pt'),reverse=True)):
		C=B.from_main(D.read_bytes()if B.is_main else None)
		if i.sha256(C[32:]).digest()==C[:32]:return A.load(io.BytesIO(C[32:]),map_location='cpu',weights_only=True)
		log.event('checkpoint_damaged',path=D)
def Bg(trainer,folder):
	F=folder;A=trainer;B=Bf(F,A.runtime,A.log)
	if B is None:K=f"{F} holds no whole checkpoint: training begins at step 0";A.log.event('warning',text=K);return
	G,I=A.average,A.optimizer.adam;(D,L),E=AX(A),B['settings'];J=[f"{A}={D.get(A)} (was {E.get(A)})"for A in D|E if D.get(A)!=E.get(A)];H(not J,f"resume: the checkpoint is of another run: {', '.join(J)}")
	for(M,N)in L.items():
		for(C,O)in A.flat.named(N).items():O.copy_(B['tensors'][M][C])
	I.load_state_dict(I.state_dict()|{'state':B['adam']['state']})
	for(P,Q)in((A,AV),(G,AW)):
		for C in Q:setattr(P,C,B[C])
	A.plan=A3(A.hp,A.step-1,G.last_progress);R=f"{1000*A.elapsed:.0f}ms";A.log.event('resume',step=A.step,train_time=R)
Bh=.999,.9995,.9999,.99999,1.
Y,Bi=31,127
Bj=65536
Bk,AZ=512,7168
Bl=[{'id':f.FILTER_LZMA2,'preset':6,'dict_size':4096,'lc':0,'lp':0,'pb':0}]
Aa=b'SGR1'
Bm=1<<30
def A5(w,levels,floor):
	I=levels;J=[(1-A)*(w.size(-1)-1)for A in Bh];B=w.abs().topk(M(w.size(-1),2+int(E(J)))).values;C=A.zeros_like(B[...,:1]);D=A.full_like(C,G.inf)
	for F in J:K,N=int(F),M(int(F)+1,B.size(-1)-1);O=A.lerp(B[...,K,None],B[...,N,None],F-K);H=A.maximum(O/I,floor).half().float();L=(t(w,H,I)*H-w).square().sum(-1,keepdim=True);C=A.where(L<D,H,C);D=A.minimum(L,D)
	return C
def t(w,scale,levels):B=levels;return A.round(w/scale).clamp(-B,B)
@W
def Bn(w:C,floor:C)->C:
	with A.no_grad():B=A5(w,Y,floor);C=t(w,B,Y)*B
	return C+(w-w.detach())
def c(index):return 2.**(-index/Bk)
def A6(name,shape):A=shape;B=D(A)==2 and G.prod(A)>Bj;return Y if name in X else Bi if B else 0
def Ab(shapes):
	B=0
	for(D,A)in shapes.items():C,E=G.prod(A),G.prod(A[:-1]);B+=C+2*E if A6(D,A)else 2*C
	return B
def Bo(tensors,floor):
	D=[]
	for(F,B)in tensors.items():
		C=A6(F,B.shape)
		if C:G=floor if C==Y else c(AZ);E=A5(B,C,A.tensor(G,device=B.device));D+=[E.half(),(t(B,E,C)+C).to(A.uint8)]
		else:D.append(B.half())
	return b''.join(A.cpu().numpy().tobytes()for A in D)
def Bp(payload,shapes):
	D,I={},io.BytesIO(payload)
	def E(dtype,shape):C=shape;B=dtype;D=F.frombuffer(I.read(G.prod(C)*F.dtype(B).itemsize),B);return A.from_numpy(D.astype(F.float32)).reshape(tuple(C))
	for(H,B)in shapes.items():C=A6(H,B);J=E(F.float16,(*B[:-1],1))if C else 1.;D[H]=(E(F.uint8 if C else F.float16,B)-C)*J
	return D
def Bq(header,tensors,floor_index):A=x.dumps(header,separators=(',',':')).encode();B=Aa+D(A).to_bytes(4,'little')+A;C=Bo(tensors,c(floor_index));return f.compress(B+C,format=f.FORMAT_XZ,filters=Bl)
def Ac(tensors,floor):
	C=tensors;D=float(Ab({A:B.shape for(A,B)in C.items()}))
	for B in(C[A]for A in X):E=A5(B,Y,A.tensor(floor,device=B.device));F=(t(B,E,Y)+Y).to(A.uint8).flatten();H=A.bincount(F,minlength=2*Y+1).double()/B.numel();I=A.special.entr(H).sum().item()/G.log(2);D-=B.numel()*(1-1.01*I/8)
	return D
def A7(tensors,limit_bytes):
	A,B=0,AZ+1
	while B-A>1:C=(A+B)//2;D=Ac(tensors,c(C))<=limit_bytes;A,B=(C,B)if D else(A,C)
	return A
def Br(hp,tensors,path,log):
	J=log;G=tensors;B=path;F,K,L=Ah(hp),Ag(),1;C=AA(N(Bq,hp.architecture(),G));A=A7(G,F);O=D(C(A))/Ac(G,c(A));A=A7(G,F/O)
	while D(C(A))>F and A>0:J.event('export_probe',floor_index=A,artifact_bytes=D(C(A)));A,L=E(0,A-L),2*L
	I,M=D(C(A)),D(C(A))<=F;B=B if M else B.with_suffix('.oversize.xz');B=Ai(B,C(A),J);P={'code_bytes':K,'model_bytes':I,'total_bytes':K+I};Q={'floor_index':A,'floor':c(A)};J.event('artifact',path=B,**P,margin_bytes=F-I,**Q);R=f"artifact_limit_bytes={hp.artifact_limit_bytes}: code and model need {K+I}";H(M,f"{R} at the coarsest setting, kept as {B}: make the model smaller");return B
def Bs(text):A,D=x.loads(text),V().architecture();H(m(A,dict)and n(A)==n(D),'its header is another one');B=A['train_seq_len'];E={'train_batch_tokens':B,'micro_batch_tokens':B,'eval_stride':1};F={A.upper():str(B)for(A,B)in(A|E).items()};C,G=AD(F,[]);H(C.vocab_size is not None,'its header has no vocabulary');return C
def Ad(path):
	C=path;A=f.LZMADecompressor(f.FORMAT_XZ,memlimit=1<<26)
	try:F=A.decompress(C.read_bytes(),8);G=int.from_bytes(F[4:],'little');L=F[:4]!=Aa or not 0<G<1<<16;H(not L,'it does not begin like an artifact');I=Bs(A.decompress(b'',G));J={A:B.shape for(A,B)in A2(I).items()};B=Ab(J);H(B<=Bm,f"it claims {B} bytes of weights");K=A.decompress(b'',B+1);M=D(K)==B and A.eof and not A.unused_data;H(M,'it has too few or too many bytes')
	except R as E:raise P(f"artifact {C} cannot be read: {E.strerror}")from None
	except(f.LZMAError,EOFError,h,Ao,OverflowError)as E:N=f"artifact {C} is damaged or foreign ({E}): copy or export it again";raise P(N)from None
	return I,Bp(K,J)
def Bt(first,last,seq_len,stride):G=stride;D=seq_len;C=first;A=last;H=M(A,E(C+G,D));B=F.array([*range(H,A,G),A],dtype=F.int64);return F.stack([F.maximum(B-D,0),F.append(C,B[:-1]),B],axis=1)
class Ae:
	def __init__(B,hp,data,runtime,log):E=runtime;C=log;B.hp,B.runtime,B.log=hp,E,C;B.scoring=A4(hp.eval_batch_seqs,C);B.training=A4(hp.micro_batch_tokens//hp.train_seq_len,C);B.tokens=A.from_numpy(data.val_tokens.astype(F.int32)).to(E.device);B.num_targets=D(B.tokens)-1;B.bytes=data.token_bytes.of(B.tokens[:-1],B.tokens[1:])
	@A.no_grad()
	def score(self,model:AP,targets:range,stride:int,passes:int,name:str|None=None)->C:
		A=self;D=N(A.score_windows,model,targets,stride,passes,name);B,C=A.scoring.run(D)
		for E in(B,C):A.runtime.sum_(E)
		if not bool((C[:-1]==1).all()):raise An('a target was not scored exactly once: this is a fault of scoring')
		return B[:-1]
	def score_windows(C,model,targets,stride,passes,name,size):
		K=stride;H=size;G=targets;B,I=C.hp.train_seq_len,C.runtime.device;L=A.zeros(D(G)+1,device=I);Q=A.zeros_like(L,dtype=A.int32);R=Bt(G.start,G.stop,B,K);J=R[C.runtime.share(D(R))];S=J[:,1]>=J[:,0]+B-K
		for(M,T)in((J[S],K),(J[~S],B)):
			for N in range(0,D(M),H):
				U=M[N:N+H];X=F.pad(U,((0,H-D(U)),(0,0)));V,Y,Z=A.from_numpy(X).to(I).unsqueeze(2).unbind(1);W=C.tokens[V+A.arange(B+1,device=I)];a,c=model(W[:,:-1],W[:,1:],passes,score_last=T);O=V+A.arange(B-T,B,device=I);b=(O>=Y)&(O<Z);P=A.where(b,O-G.start,D(G)).flatten();L.index_copy_(0,P,a.flatten());Q.index_add_(0,P,A.ones_like(P,dtype=A.int32))
				if name:C.log.progress(f"{name} {(N+H)/E(H,D(M)):4.0%}")
		return L,Q
	def bits_per_byte(B,losses):A=losses;return A.double().sum().item()/G.log(2)/int(B.bytes[:D(A)].sum())
	def report(A,name,losses,since,**E):B=losses;C={'val_loss':f"{B.double().mean().item():.8f}"};C|={'val_bpb':f"{A.bits_per_byte(B):.8f}",'tokens':D(B)};F=f"{K.perf_counter()-since:.3f}";A.log.event(name,**C,bytes=int(A.bytes.sum()),seconds=F,**E);A.log.has_results=True
	def run(A,name,model,stride,passes,**D):B=passes;E=K.perf_counter();C=A.score(model,range(A.num_targets),stride,B,name);A.report(name,C,E,passes=B,**D);return C
	def run_all(A,model,flat,passes):
		D=passes;C=model;B,F=A.hp,K.perf_counter()+(A.hp.eval_wallclock_seconds or G.inf);E=A.run('final_int6_roundtrip_exact',C,B.train_seq_len,D)
		if B.sliding_eval:E=A.run('final_int6_sliding_window_exact',C,B.eval_stride,D)
		if B.ttt_enabled:E=A.run_ttt(C,flat,D,F)
		return E
	def run_ttt(B,model,flat,passes,deadline):
		R=model;L=passes;C,N,O=B.hp,K.perf_counter(),0;S=A.optim.SGD([flat.whole(e(None))],momentum=.9);F=range(0,B.num_targets,C.ttt_chunk_tokens);I=A.zeros(B.num_targets,device=B.tokens.device)
		for(H,P)in enumerate(F,1):
			J=range(P,M(P+C.ttt_chunk_tokens,B.num_targets));I[P:J.stop]=B.score(R,J,C.eval_stride,L);Q,T=K.perf_counter(),D(F)-H
			if H%E(1,D(F)//20)==0:V,W=B.bits_per_byte(I[:J.stop]),f"{H}/{D(F)}";B.log.event('ttt_chunk',chunk=W,val_bpb=V,time=f"{Q-N:.1f}s")
			U=(Q-N)/H
			if not O:U*=1+3*C.ttt_epochs*C.eval_stride/C.train_seq_len
			X=Q+T*U<deadline
			if T and B.runtime.from_main(X):Y=G.cos(G.pi*(H-1)/(D(F)-1));S.param_groups[0]['lr']=C.ttt_lr*.5*(1+Y);B.train_on(R,flat,S,J,L);O+=1
			B.log.progress(f"legal_ttt {H}/{D(F)} chunks")
		Z=f"{O*C.ttt_epochs}/{(D(F)-1)*C.ttt_epochs}";B.report('legal_ttt_exact',I,N,passes=L,epochs=Z);return I
	def train_on(B,model,flat,sgd,targets,passes):
		D=targets;C=flat;E,F=B.hp,B.hp.train_seq_len;G=range(D.start,D.stop-F+1,F);H=A.tensor(G,dtype=A.int64,device=B.tokens.device)
		for I in list(H.split(E.ttt_batch_seqs))*E.ttt_epochs:B.training.run(N(B.accumulate,model,C,I,passes));J=B.runtime.sum_(C.grad).norm();C.grad.mul_((1/(J+1e-06)).clamp(max=1.));sgd.step()
	def accumulate(B,model,flat,starts,passes,at_once):
		C=starts;flat.grad.zero_();H,E=C[B.runtime.share(D(C))],B.hp.train_seq_len
		for F in AU(H,at_once):G=B.tokens[F[:,None]+A.arange(E+1,device=F.device)];I,J=model(G[:,:-1],G[:,1:],passes);(I.sum()/(D(C)*E)).backward()
if triton is not None:
	@triton.jit
	def Bu(a:tl.tensor_descriptor,b:tl.tensor_descriptor,s:tl.tensor_descriptor,out:tl.tensor_descriptor,N:tl.constexpr,K:tl.constexpr,BACKWARD:tl.constexpr)->None:
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
	def A8(a:C,b:C,s:C|None)->C:out=a.new_empty(a.size(0),b.size(0));B=2*A.cuda.get_device_properties(a.device).multi_processor_count;C=[A.contiguous()for A in(a,b,out if s is None else s,out)];D=[A_.from_tensor(A,[128,64])for A in C];Bu[B,](*D,*b.shape,s is not None);return out
	A8.register_fake(lambda a,b,s:a.new_empty(a.size(0),b.size(0)))
class Bv(A.autograd.Function):
	@v
	def forward(ctx:a,x:C,up:C,down:C)->C:s=A8(x,up,None);ctx.save_for_backward(x,up,down,s);return J.linear(s,down)
	@v
	def backward(ctx:a,dy:C)->tuple[C,...]:B,C,D,s=ctx.saved_tensors;A=A8(dy,D.T,s);return A@C,A.T@B,dy.T@s
def Af(device,dtype,up_shape):C=up_shape;B=device;D=dtype==A.bfloat16 and C[0]%128==0==C[1]%64;E=B.type=='cuda'and A.version.hip is None and triton is not None;return D and E and A.cuda.get_device_capability(B)[0]==9
def Bw(hp,runtime):
	F=runtime;A=hp;I=F.from_main(A.run_id or f"{K.strftime('%Y%m%d_%H%M%S')}_seed{A.seed}");J='.txt','.int6.xz','.checkpoints';B,C,G=(L(A.output_dir)/f"{I}{B}"for B in J);M=(C,)if A.resume else(B,C,G);E=F.from_main([str(A)for A in M if A.exists()]);D='choose another run_id'
	if str(C)in E:D=f"{D}, or score it again with --evaluate {C}"
	elif str(G)in E:D=f"{D}, or go on from its checkpoint with --resume"
	H(not E,f"run_id: {', '.join(E)} would be overwritten: {D}");N=B.is_file()and b'\nartifact 'in B.read_bytes()and A.resume;O=f"run_id: {B} is of a finished run, which is not resumed";H(not F.from_main(N),f"{O}: choose another run_id");return B,C,G
def Bx(hp):A=hp;B,C=L(A.output_dir).absolute(),L(A.token_losses or'losses.npy');E=next(A for A in(B,*B.parents)if A.exists());D=0 if A.evaluate else A.artifact_limit_bytes;F=shutil.disk_usage(E).free>D;G='run data/download_fineweb.py or data/prepare_text.py, or set DATA_PATH';z((L(A.data_path).is_dir(),f"data_path={A.data_path} is no folder: {G}"),(A0(A).is_file(),f"tokenizer_path={A0(A)} is missing: set it"),(C.parent.is_dir()and not C.is_dir(),f"token_losses={C} can be no file"),(F,f"output_dir={B}: less than {D} bytes free"))
def Ag():return L(__file__).stat().st_size
def Ah(hp):return hp.artifact_limit_bytes-Ag()
def A9(path,data):
	A=path;B=A.with_name(A.name+'.tmp')
	try:B.write_bytes(data);B.replace(A)
	except R:B.unlink(missing_ok=True);raise
def Ai(path,data,log):
	A=path
	with q(R):A9(A,data);return A
	B=L(Aq.mkdtemp(prefix='train_gpt_'))/A.name;C=f"{A} cannot be written, {B} is instead";log.event('warning',text=C);u(f"warning: {C}",file=T.stderr);A9(B,data);return B
def By(hp,sources,runtime,log):
	I=sources;E=hp;C=runtime;B=log;J=L(__file__).read_bytes();N=i.sha256(J).hexdigest();B.event('code',name=L(__file__).name,bytes=D(J),sha256=N);K={'torch':A.__version__,'cuda':A.version.cuda,'numpy':F.__version__};K|={'sentencepiece':AB.__version__,'triton':Z(triton,'__version__',None)};B.event('versions',python=T.version.split()[0],**K);O=f"{S.uname().machine} x{S.cpu_count()}";G=A.cuda.get_device_name()if C.on_gpu else O
	if C.on_gpu and C.dtype==A.float32:B.event('warning',text='computes in float32: this GPU has no bfloat16, or dtype is set')
	B.event('device',name=G,world_size=C.world_size,dtype=str(C.dtype)[6:]);H={A.name:str(Z(E,A.name))for A in j(E)};M={A:B for(A,B)in H.items()if I[A]=='default'}
	for G in[A for A in H if A not in M]:B.event('config',name=G,value=H[G],source=I[G])
	B.event('defaults',**M)
	if not C.on_gpu and not E.evaluate and E.model_dim*E.num_layers>4096:P='a model of this size takes minutes a step on a CPU: --env scripts/demo.env is small';B.event('warning',text=P)
def Aj(hp,runtime,log):
	B=runtime;A._dynamo.config.recompile_limit=128
	if hasattr(A._inductor.config.triton,'mix_order_reduction'):A._inductor.config.triton.mix_order_reduction=False
	A.manual_seed(hp.seed);C=AP(hp,B.dtype).to(B.device);D={'parameters':sum(A.numel()for A in C.parameters())};E=Af(B.device,B.dtype,C.mlp_up_bank.shape[1:]);D|={'fused_mlp':int(E),'compile':'on'if B.compiles else'off'};log.event('model',**D);return C
def Ak(hp,stored):A=stored;B=A.train_seq_len;C={'train_batch_tokens':B,'micro_batch_tokens':E(B,hp.micro_batch_tokens)};C['eval_stride']=M(B,hp.eval_stride);C['eval_passes']=hp.eval_passes or A.eval_passes;return y(hp,**A.architecture()|C)
def Bz(trainer,evaluator,artifact,checkpoints):
	F=checkpoints;E=evaluator;B=artifact;A=trainer;D,C,G=A.hp,A.log,A.stop
	if D.resume:Bg(A,F)
	A.warm_up(E);C.phase('warm_up');H=D.on_signal=='checkpoint';K='writes a checkpoint and ends'if H else'exports and scores what it has';G.advice=f"the run {K}; a second signal ends it at once";I=A.train(E,F);C.phase('training')
	if I and H and AY(A,F):return AC,B
	J=A.average_weights();E.run('pre_quant_exact',A.model,D.train_seq_len,J);C.phase('pre_quant_evaluation')
	if A.runtime.is_main:L=A.flat.named(A.flat.data);B=Br(y(D,eval_passes=J),L,B,C)
	C.phase('export');G.advice,G.farewell='',f": score {B} with --evaluate {B}";return B2 if I else 0,B
def B_(hp,artifact,evaluator):
	E=evaluator;A=hp;C,B,H=E.runtime,E.log,s();D,I=C.from_main(Ad(artifact)if C.is_main else None);A=Ak(A,D)
	if A.eval_passes>(D.eval_passes or D.max_passes):J=f"{A.eval_passes} passes score, {D.eval_passes} were trained";B.event('warning',text=J)
	G=Aj(A,C,B);G.load_state_dict(I);K=E.run_all(G,AR(G),A.eval_passes);B.event('evaluated',graphs_compiled=s()-H);B.phase('evaluation')
	if A.token_losses and C.is_main:F.save((M:=io.BytesIO()),K.cpu().numpy());Ai(L(A.token_losses),M.getvalue(),B)
def C0(hp,sources,runtime,stop):
	E=sources;B=runtime;A=hp;Bx(A);H,D,J=Bw(A,B)
	if A.evaluate:D=L(A.evaluate);A=Ak(A,B.from_main(Ad(D)[0]if B.is_main else None));M='eval_passes'if E['eval_passes']!='default'else'';E|={A:'artifact'for A in A.architecture()if A!=M}
	A,F=BG(A,B);C,G=AG(H if B.is_main else None,A.resume),0
	try:
		C.event('run',run_id=H.stem,started=K.strftime('%Y%m%d_%H%M%S'));By(A,E,B,C)
		for N in F.facts:C.event('data',**N)
		C.phase('start');I=Ae(A,F,B,C)
		if not A.evaluate:O=Be(Aj(A,B,C),F,B,C,stop);G,D=Bz(O,I,D,J)
		if G!=AC:B_(A,D,I)
		return G
	except BaseException as P:C.abandon(P);raise
def C1():
	A,B=None,B7();B.install()
	try:
		C,E=AD(S.environ,T.argv[1:]);A=AE.start(C)
		with Ay(BH,set_priority=True):F=C0(C,E,A,B)
		A.barrier();return F
	except(P,Ap)as D:u('\n'.join(f"error: {A}"for A in str(D).splitlines()),file=T.stderr);return B0 if m(D,P)else B1
	finally:
		if A is not None and A.world_size>1:b.destroy_process_group()
if __name__=='__main__':C2=C1();T.stdout.flush();S._exit(C2)
