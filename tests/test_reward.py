"""Tests of reward.py: a table of equal and different answers for every kind of gold, the public regression cases and
the golds of the benchmarks where ../shared has them, and what hostile text must not do."""

import ast
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data
import data.download
import reward
from grading import sympy_process
from reward import final_answer, grade, score, score_all

SHARED = Path(__file__).parents[2] / "shared"
ROOT = Path(reward.__file__).parent

# Labels of dev.jsonl that we disagree with: (source, gold, response) -> reason. There are none.
DISAGREED: dict[tuple[str, str, str], str] = {}

# A gold, then answers that equal it (==) or do not (!=); each pair must hold in both directions.
TABLE = r"""
# integers
142 == 142.0 == 0142 != 142.1 != 1420
7 == 007 == +7
-7 == - 7 != 7
1234 == 1{,}234 == 1,234.0 != 1,235 != 1.234
1234567 == 1\,234\,567 == 1,234,567
12345 == 12\ 345
1,000 == 1000
10,\!080 == 10080
1000000 == 10^6
17 != 71
1000 != 1,000,000
9007199254740993 != 9007199254740992
123456789012345678901234567890 != 123456789012345678901234567891
0 != -1
12 != 1,2
5 != five hundred
204 != 204 \text{ or } 205 != 204, 205
6 != 6 \text{ is wrong, it is } 7
# fractions
\frac{3}{4} == 3/4 == \dfrac{3}{4} == \tfrac34 == \frac{6}{8} == \frac 3 4 == 0.75 == {3 \over 4}
\frac{3}{4} == \left(\frac{3}{4}\right) == \cfrac{3}{4} != \frac{4}{3} != -\frac{3}{4} != \frac{3}{5} != 34 != 3,4
-\frac{3}{4} == \frac{-3}{4} == -3/4 == \frac{3}{-4}
\frac{10}{4} == 2\frac12
\frac{22}{7} == \frac{\frac{22}{1}}{7}
\frac{1}{12} == \frac1{12}
\frac{1}{3} != 0.33 != 0.333 == 0.333333333333 == 0.\overline{3}
\frac{1}{6} == 0.1\overline{6}
\frac{2}{3} != 0.667
\frac{1997}{2} == 998.5 != 998
# expressions
x^2+2x+1 == (x+1)^2
x^2-1 == (x-1)(x+1)
2(x+4)(x-4)(x-8) == 2x^3-16x^2-32x+256
p - q == -q+p != q - p
5r^5 == 5 r^{5} != 5r^4
3^n + 1 == 1 + 3^n != 3^{n+1}
3^{n+1} == 3\cdot 3^n
2^{n+1}-2 == 2(2^n-1) != 2^{n}-2
\frac{n(n+1)}{2} == \binom{n+1}{2} != \frac{n(n-1)}{2}
\sqrt[3]{x} == x^{1/3} != \sqrt{x} != 3\sqrt{x}
\cot x == \frac{1}{\tan x} == \frac{\cos x}{\sin x} != \tan x
\sin 2x == 2\sin x\cos x
\sin^2 x == 1-\cos^2 x != \sin x^2
e^{2x} == (e^x)^2
e^{x^2} != e^{2x}
\ln(x^2) == 2\ln x
\ln(x+1) != \ln x + 1
2k+2 == 2(k+1) != 2k+1
k! \cdot (k+1) == (k+1)!
(n+1)!-(n-1)! == (n-1)!(n^2+n-1)
2^{n-1} == \frac{2^n}{2}
(2n)! \cdot 2^{n^2} != (2n)! \cdot 2^{2n}
\lfloor n/2 \rfloor == \left\lfloor \frac{n}{2} \right\rfloor != \lceil n/2 \rceil != \frac{n}{2}
\lceil n/2\rceil+1 == \lfloor (n+1)/2\rfloor+1
|x| == \sqrt{x^2} != x
\frac{a}{b+c} != \frac{a}{b}+c != a/b+c
x^{10} == x^10
x_1+x_2 == x_2+x_{1} != x_1+x_3
\frac{K-1}{L} == (K-1)/L
ab == ba != a+b
\alpha + \beta == \beta+\alpha
\alpha != \beta
\frac{a M^{1/3}}{G M^{2/3}+b} == \frac{a\sqrt[3]{M}}{G\sqrt[3]{M^2}+b}
I(0)e^{-\frac{t}{RC}} == I(0) e^{-t/RC} != 0
2\omega(m)+1 == 1 + 2\omega(m)
# lists
1,-2 == -2, 1
3, 5, 7 == 7,5,3 == 3; 5; 7 == 3, 5, \text{ and } 7 == \{3,5,7\} == 3 \text{ or } 5 \text{ or } 7 != 3, 5
3, 5, 7 != 3, 5, 7, 9 != 3, 5, 8 != 15
1, 5, 9 != 1, 5, 5
\frac12, 3 == 3, 0.5
$69$,$84$ == 84, 69 != 69
1, 100, 101, 201 == 1,100,101,201 == 201, 101, 100, 1
2, 128, 2000 == 2,128,2000
x = 2, x = 3 == 3, 2
x=2 \text{ or } x=3 == x=3,x=2 != x=2
0, 2, 4, \ldots, 1022 == 0,2,4,\dots,1022
# decimals and scientific notation
9.6 == 9.60 == 48/5 != 9.7 != 9.61
0.022 == .022 == 2.2 \times 10^{-2}
8.7e8 == 8.7 \times 10^8 == 870000000 != 8.7 \times 10^7 != 8.7
8.7 \times 10^{8} == 8.7e8 == 8.7 \cdot 10^{8} == 870,000,000
3.89e-10 == 3.89\times10^{-10} != 3.89\times10^{10}
4.5e33 == 4.5 \times 10^{33}
10^{-3} == 0.001 == 1 \times 10^{-3}
7 \times 10^{37} != 7 \times 10^{38}
0.5 == 0.50000000
3.14 != \pi
2.718 != e
\pi == 3.14159265358979
1.41421356 != \sqrt{2}
\sqrt{2} == 1.41421356237
# surds
12\sqrt{3} == 12 \sqrt 3 == \sqrt{432} != 12\sqrt{2} != 12\sqrt[3]{3} != \sqrt{12 \cdot 3}
\frac{\sqrt{3}}{3} == \frac{1}{\sqrt{3}} == \sqrt{\frac13}
\sqrt{9+6\sqrt{3}} == (9+6\sqrt3)^{1/2}
30(1+\sqrt5) == 30+30\sqrt{5} != 30+\sqrt{5}
2\sqrt{3}-2 == 2(\sqrt3-1)
\sqrt[3]{2} == 2^{1/3} != \sqrt{2}
\frac{8}{\sqrt[3]{7}} == \frac{8\sqrt[3]{49}}{7}
3+2\sqrt2 == (1+\sqrt2)^2
\sqrt{5+2\sqrt6} == \sqrt2+\sqrt3 != \sqrt2-\sqrt3
11\sqrt2 == 11\sqrt{2}
\sqrt{-4} == 2i
\sqrt[3]{-8} == -2
5 \sqrt[3]{4} != 5 \sqrt{4}
2 - \sqrt{3} != \sqrt{3} - 2
# assignments
k=5 == 5
x=5 == x = 5 == 5 = x != x=-5 != y=5 != 0=0 != x=x != 5=5
f(x)=x+1 == x+1 == y=x+1 == f(x)=1+x != f(x)=x-1 != g(x)=x+1
f(n)=n^2 == n^{2}
a=2, b=-14 == b=-14,a=2 == (a,b)=(2,-14) == (2,-14) != (-14,2) != a=-14,b=2
(m, n) = (36, 6) == (36,6) == m=36, n=6 != (6, 36)
m_{\max}=n^{2}-n-1 == n^2-n-1
a_n = 2^{n-1} == 2^{n-1}
y = -2x == -2x
S = 55 == 1+2+\cdots+10 = 55
\angle ABC = 30^\circ == 30
x \approx 3.5 == 3.5
# tuples and points
(2,-3) == \left(2,\,-3\right) == ( 2 , -3 ) != (-3,2) != (2,3) != 2
(6,31,-1) == (6, 31, -1) != (6,31)
\left(\frac32,-13\right) == (1.5,-13)
(0,0),(1,1),(2,2) == (2,2),(1,1),(0,0) != (0,0),(1,1) != (0,0),(1,1),(2,3)
(2, 3)(2, 7) == (2,7),(2,3)
(2,1),(3,1) == \{(3,1),(2,1)\} == (2,1) \text{ and } (3,1) != (1,2),(1,3)
(1,234) == (1, 234) != 1234
(3,2),(-3,2),(3,-2),(-3,-2) == (\pm 3, \pm 2)
\langle 1,2,3\rangle == \langle 1, 2, 3 \rangle
\left(3,\frac{\pi}{2}\right) == (3,\pi/2)
# degrees
120^\circ == 120 == 120^{\circ} == 120° == 120\text{ degrees} == \angle C=120^\circ == \frac{2\pi}{3} != 60^\circ
120^\circ != 121
60^\circ,60^\circ,60^\circ == 60, 60, 60
\sin 30^\circ == \frac12
\frac{270}7\text{ degrees} == \frac{270}{7}^\circ
# pi
238\pi == 238 \pi == 238 \cdot \pi != 238 != 239\pi != 747.7
\frac{3\pi}{4} == \frac34\pi == 0.75\pi != \frac{3}{4\pi}
24\pi == 24π
54\sqrt{3}-18\pi == 18(3\sqrt3-\pi)
\frac{20000}{\pi} != 20000\pi
4\pi^2-1 == (2\pi-1)(2\pi+1)
-\frac{\pi}{6} == -\pi/6
# intervals
(3,4] == \left(3,4\right] != [3,4) != (3,4) == 3 < x \le 4 != 3 \le x < 4
(-\infty,0] == x \leq 0 != x < 0 == (-\infty,0.0]
(2,\infty) == x > 2 == 2<x == (2,+\infty) != [2,\infty) != (-\infty,2)
x \in [-2,7] == [-2,7] == -2 \le x \le 7 != (-2,7)
(0,9)\cup(9,36) == (9,36)\cup(0,9) == 0<x<9 \text{ or } 9<x<36 == (0,36)\setminus\{9\} != (0,36)
(-\infty,2)\cup(3,\infty) == x<2 \text{ or } x>3 == \mathbb{R}\setminus[2,3] != (-\infty,2]\cup[3,\infty) != 2<x<3
(-\infty,-\sqrt2)\cup(\sqrt2,\infty) == |x|>\sqrt2
(1,3) != (1,4)
(0,4] != t(0,4
n \geq 14 == n \ge 14 == [14,\infty) != n > 14 != 14
m \neq 1 == m \ne 1 == (-\infty,1)\cup(1,\infty) != m = 1 != 1
n \geq 2^k+1 == n \ge 1+2^{k} != n \ge 2^{k+1} != n \le 2^k+1
k \geqslant 2 == k\ge 2
\left[\frac{\pi^2}{8},\frac{5\pi^2}{4}\right] == [\pi^2/8, 5\pi^2/4]
# words
\text{east} == east == \text{East} == \textbf{east} != \text{west}
\text{Evelyn} == Evelyn != Eve
\text{even} != \text{odd}
\text{(C)} == C == (C) == \textbf{(C)} == \mathrm{C} != D != \text{(D)} != c^2
\text{ellipse} == \text{Ellipse} != \text{circle}
\text{Yes} == yes != no
\text{no solution} == \text{No solution}
None != 5
m != M
True == \text{true} != False
# complex numbers
6 - 5i == -5i+6 == 6-5\mathrm{i} != 6+5i != 5-6i
1+274i == 274i+1
\frac{1+i}{2} == 0.5+0.5i
1+i\sqrt3 == 1+\sqrt{3}i == 2e^{i\pi/3} != 1-i\sqrt3
\ln 2+i\frac{\pi}{3} == \ln(1+i\sqrt{3})
i == \sqrt{-1}
-1 == i^2
e^{i\theta} == \cos\theta+i\sin\theta != \cos\theta-i\sin\theta
# equations
5x-7y+11z+4=0 == -5x+7y-11z-4=0 == 10x-14y+22z+8=0 == 5x+11z=7y-4 != 5x-7y+11z-4=0 != 0=0 != x=x
y=2x+3 == 2x-y+3=0 == y-2x=3 != y=2x-3 != x=2y+3
x^2+y^2=3 == x^2+y^2-3=0 != x^2-y^2=3
r^2+r+1=0 == r+r^2+1=0 != r^2+r-1=0
x^2-6x-7=0 == (x-7)(x+1)=0 != (x-7)^2=0
y'+ry-rx(t)=0 == y^{\prime}=rx(t)-ry
\frac{x^2}{4}+\frac{y^2}{9}=1 == 9x^2+4y^2=36 != 4x^2+9y^2=36
X_{d}=125-1.25P == 125-1.25P
MR=SRMC == SRMC = MR
# matrices
\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix} == \begin{bmatrix}-2\\-14\\-7\end{bmatrix}
\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix} != \begin{pmatrix} -2 & -14 & -7 \end{pmatrix}
\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix} != \begin{pmatrix} -2 \\ 14 \\ -7 \end{pmatrix}
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} == \begin{pmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{pmatrix}
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} == \frac13\begin{pmatrix} -1 \\ 2 \\ 5 \end{pmatrix}
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} == -\begin{pmatrix}1&0\\0&1\end{pmatrix}
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} == \left(\begin{array}{cc}-1&0\\0&-1\end{array}\right)
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} != \begin{pmatrix} 0 & -1 \\ -1 & 0 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} != \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix} != 1,2,3,4
# bases
52_8 == 52_{8} == (52)_8 == 52_{\text{eight}} != 52_9 != 53_8 != 52
4210_{5} == 4210_5 != 4210_{6}
101_2 == 101_{2} != 110_2
2A_{16} == 2A_{16} != 2B_{16}
# units
10\text{ cm}^2 == 10 == 10 \text{ square centimeters}
10\text{ cm} == 10\,\text{cm} == 10\mathrm{~cm} != 10\text{ m} != 10 \text{ cm}^2 != 11\text{ cm}
10 == 10\text{ apples}
9 \text{ inches} == 9 \text{ inch} != 9 \text{ feet}
15\mbox{ cm}^2 == 15
864 \mbox{ inches}^2 == 864
15000 \text{ kcal m}^{-2} \text{yr}^{-1} == 15000
6.43 \times 10^{16} \text{ cm}^{-3} == 6.43e16
4.4677 \times 10^{14} Hz == 4.4677 \times 10^{14}
30 == 30\text{ km/h}
30\text{ km/h} == 30 \text{ km per hour}
1.5\text{ km} == 1500\text{ m}
5 == 5 \text{ minutes} != 5 million
5 minutes == 300 seconds
3 hours != 3 minutes
24 != 24n
5 million == 5000000
# money
\$32,\!348 == 32348 == \$32{,}348 == \$32,348.00
\$18.90 == 18.9 == 18.90\text{ dollars} != 18.09
5.4 \text{ cents} == 5.4 == \$0.054 != \$5.4
# percent
30 \% == 30 == 0.3 == \frac{3}{10} == 30\text{ percent} != 3 != 0.03 != 31\%
62.5% == 62.5\% == \frac58
17.5% != 17
0.3 != 30
# powers and factorials
1991^2 == 3964081 != 1992^2
10^8 == 100000000
2^{1009} == 2 \cdot 2^{1008} != 2^{1010}
1/2^{99} == 2^{-99} != 1/2^{98}
1/2006! != 1/2004! == \frac{1}{2006!}
\frac{100!}{2^{50}} == 100!/2^{50} != \frac{100!}{2^{49}}
\frac{2016}{2017^{2}} == \frac{2016}{4068289}
\frac{4 \cdot 999^{4}}{27} == \frac{4}{27}\cdot 999^4
2021 \cdot 505 \cdot 337 == 343943885
2^{2^{10}} == 2^{1024}
10^{100} != 10^{10}
3^{2025} != 3^{2024}
3^{2025}-1 != 3^{2025}
10^{1/100} == \sqrt[100]{10}
2^{100000}+1 != 2^{100000}
\binom{10}{3} == 120 == \frac{10!}{3!7!}
5! == 120
2^{-2/3} == \frac{1}{\sqrt[3]{4}}
# mixed numbers
1\frac{4}{5} == \frac95 == 1.8 == 1 \frac45 == 1 4/5 != \frac{4}{5} != \frac{14}{5}
137 \frac{1}{2} == 137.5 == \frac{275}{2}
-2\frac13 == -\frac73 != -\frac53
# plus-minus
1 \pm \sqrt{19} == 1+\sqrt{19}, 1-\sqrt{19} == 1-\sqrt{19}, 1+\sqrt{19} == x = 1 \pm \sqrt{19}
1 \pm \sqrt{19} == \{1+\sqrt{19}, 1-\sqrt{19}\} != 1+\sqrt{19} != -1 \pm \sqrt{19}
\pm 3 == 3, -3 != 3
3 \pm 2\sqrt2 == 3 \mp 2\sqrt{2}
\{1\pm\sqrt{5},-2\} == -2, 1+\sqrt5, 1-\sqrt5 == \{-2,1-\sqrt5,1+\sqrt5\} != \{1\pm\sqrt{5}\} != \{1\pm\sqrt{5},2\}
# sets
\{2,3\} == \{3,2\} == 2,3 != \{2,4\} != (2,3) != [2,3]
n \in \{69, 84\} == \{69,84\} == 69, 84
\{13500, 13501, 13502, \ldots\} == \{13500,13501,13502,\dots\}
\emptyset == \{\} == \varnothing != \{0\}
(-\infty,0)\cup\{1\} == \{1\}\cup(-\infty,0) != (-\infty,0)\cup\{2\}
\mathbb{R} == (-\infty,\infty)
\{1,2\} == \{1,2,2\}
# congruences
m \equiv 2, 5, 7, 10 \pmod{12} == m \equiv 10,7,5,2 \pmod{12} == m \equiv 2, 5, 7, 10 \ (\text{mod } 12)
m \equiv 2, 5, 7, 10 \pmod{12} == m\equiv \pm 2, \pm 5 \pmod{12} != m \equiv 2, 5, 7 \pmod{12}
m \equiv 2, 5, 7, 10 \pmod{12} != m \equiv 2, 5, 7, 10 \pmod{13}
n \equiv 1 \pmod 3 == n \equiv 4 \pmod{3} != n \equiv 2 \pmod{3}
3 \mid n == 3\mid n != 2 \mid n
n \equiv 0 \pmod 3 == 3 \mid n
# raw golds
\[ 1979 \] == 1979
\(\boxed{77}\) == 77
$\boxed{a=170}$ == 170 != 171
9.6$ == 9.6
$8 \%$ == 8
$221,$8$ == 221, 8
$(-\infty, 0) \cup\{1\}$. == (-\infty,0)\cup\{1\}
16:1 == 16 : 1 != 1:16
2:3 == 4:6 != 3:2
1:36 == 1:36
{a_n = 2^{n-1}} == 2^{n-1}
+2 == 2
2,-\log _{10} 250 == -\log_{10}(250), 2
\frac{\log 2}{\log 2-\log 3} == \frac{\ln 2}{\ln 2-\ln 3}
\log_2 9 == \frac{\log 9}{\log 2}
f(x)=-1$,$f(x)=x+1 == f(x)=x+1, f(x)=-1
f(n)=n, g(n)=1 == g(n)=1, f(n)=n != f(n)=1, g(n)=n
1950^\circ C == 1950^\circ C
x=\frac{1}{6}\pi+\pi k == x=\pi k+\frac{\pi}{6}
E_{1},E_{2} == E_1, E_2 != E_1, E_3
SRAC=LRAC == LRAC=SRAC
\sqrt{2}\cos(2t-\pi/4) == \cos 2t+\sin 2t != \cos 2t-\sin 2t
m \frac{d v}{d t}+b v=f == m\frac{dv}{dt} = f - bv
x'+\frac{r}{V}x-rc=0 == x' = rc-\frac{r}{V}x
ml\ddot{\theta}(t)-mg\sin\theta(t)=f(t)\cos\theta(t) == ml\ddot\theta(t)=mg\sin\theta(t)+f(t)\cos\theta(t)
# all kinds, a second look
\frac{1}{2}x == \frac{x}{2}
x/2 == 0.5x
\sqrt{x^2+1} != x+1
(x+1)^2 != x^2+1
\frac{x+1}{x} == 1+\frac1x
\frac{x^2-1}{x-1} == x+1
2^{x+y} == 2^x 2^y
\log_2 x != \log_3 x
\sin x+\cos x == \sqrt2\sin(x+\pi/4)
\tan^{-1} x == \arctan x
\arctan 1 == \pi/4
\cos^{-1}(1/2) == \frac{\pi}{3} == 60^\circ
5\sqrt{2}\text{ cm} == 5\sqrt2
5\text{ m/s} == 5 \text{ meters per second} != 5\text{ m/s}^2
x=1,y=2 == (1,2)
(x,y)=(1,2) == x=1,\ y=2 == x=1 \text{ and } y=2 != (2,1)
(x,y)=(1,2),(3,4) == (3,4),(1,2)
12 == 12. == \boxed{12} == \textbf{12} == \mathbf{12} == {12} == (12) == \text{12} == 12 \text{ units} == \approx 12
12 != -12 != 1.2 != 12i != 12x != 12\pi != 12\sqrt{2} != 12! != 12^2 != |12-1| != 12+1 != 12 + x != 12\text{ or }13
12 != 12, 13 != \{12,13\} != (12,13) != 12 \ldots != x > 12 != x \ge 12 != x \neq 12 != [12, \infty) != 11 < x < 13
12 != \frac{12}{5} != 12_{8} != 12\%5 != 12:5 != 0.12 == 12\% == 24/2 == 1.2 \times 10 == 1.2e1 == \sqrt{144}
12 == 3 \cdot 4 == 3*4 == 3 \times 4 == 4!/2 == n = 12 == \text{The answer is } 12 == 12 \text{ (approx)} == \$12
12 != 1\ 2
x^2 != x_2
x_1 != x1^2
\frac{\pi}{4} != \frac{4}{\pi}
\pi^2 != 2\pi
-x^2 != (-x)^2
-3^2 == -9 != 9
2x^2 != (2x)^2
1/(2x) != \frac{x}{2}
e != 2.71828
e^{-1} == 1/e == \frac{1}{e}
\ln 8 == 3\ln 2
\log 100 == 2
\log_{10} 100 == 2
\log 8 != 2
\sqrt{2}+\sqrt{3} != \sqrt{5}
\sqrt{2}\sqrt{3} == \sqrt{6}
\frac{\sqrt{6}}{2} == \sqrt{1.5}
\frac{\sqrt{6}-\sqrt2}{4} == \sin 15^\circ
2\cos 40^\circ != 2 \cos 40
\frac{1+\sqrt5}{2} == \varphi = \frac{1+\sqrt{5}}{2} != \frac{1-\sqrt5}{2} != 1.618 == 1.6180339887498949
(1,2] \cup [3,4) == [3,4)\cup(1,2] != (1,2)\cup(3,4)
[0,1] != \{0,1\} != 0,1
[0,1) == 0\le x<1
x<5 == (-\infty,5) == 5>x != x>5 != x \le 5 != 5
-1<x<1 == |x|<1 == (-1,1) != -1 \le x \le 1
x\le -2 \text{ or } x \ge 2 == (-\infty,-2]\cup[2,\infty) == |x| \ge 2
x \in (-\infty, 1) \cup (1, \infty) == x \neq 1 == \mathbb{R} \setminus \{1\} == x<1 \text{ or } x>1
(a,b) == (a, b) != (b,a)
(a,b] == a<x\le b
\{x \mid x > 2\} == (2,\infty)
\{x : x \ge 2\} == [2,\infty)
\{x \in \mathbb{R} : x > 2\} == x>2
\text{all real numbers} == \text{All real numbers}
\text{A and B} == \text{A, B}
A,B == B,A
\text{Monday} == Monday != \text{Sunday} == \text{monday}.
\text{July 4} == July 4 != \text{July 14}
2x+1=0 == x=-1/2
y=x^2 != x=y^2
y=\frac{1}{2}x+3 == x-2y+6=0
y = 3 == y=3
xy=1 == y=\frac1x == yx=1 != x+y=1
(x-2)^2+(y+3)^2=16 == x^2+y^2-4x+6y-3=0 != (x-2)^2+(y+3)^2=4 != (x+2)^2+(y-3)^2=16
6! == 720 != 719
0!=1 == 1
(2n-1)!! == (2n-1)!!
10!/(3!7!) == 120
\frac{12!}{6!} == 665280
2^{10} == 1024 != 2^{11}
2^{-10} == \frac{1}{1024}
10^{-5} == 0.00001
1e-5 == 10^{-5} != 10^{5}
6.02 \times 10^{23} == 6.02e23 == 602000000000000000000000 != 6.022 \times 10^{23}
3 \times 10^{8} \text{ m/s} == 3 \times 10^8
25\% == \frac14 == 25 == 0.25 != 2.5 != 4
\$5 == 5 dollars == 500 cents != 5 cents
\$1,234.50 == 1234.5
2 hours == 120 minutes
2 hours 30 minutes == 2 hours 30 minutes
1.5 hours == 90 min
12 \text{ cm} == 12 cm == 12\ \mathrm{cm} == 120 \text{ mm}
12 \text{ cm}^3 == 12\text{ cubic centimeters} != 12\text{ cm}^2
100\text{ km}^2 != 100\text{ m}^2
90^\circ == \frac{\pi}{2} == 90^{\circ} != 90\pi
45° == 45^\circ
\pi/3 == 60^\circ
\begin{pmatrix} 1 \\ 2 \end{pmatrix} == \begin{pmatrix} 1.0 \\ 2 \end{pmatrix} != \begin{pmatrix} 2 \\ 1 \end{pmatrix}
\begin{pmatrix} 1 & 2 \end{pmatrix} == \begin{bmatrix} 1 & 2 \end{bmatrix}
\begin{pmatrix} x & 0 \\ 0 & x \end{pmatrix} == x\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}
3+4i == 4i+3 != 3+4 != (3,4)
\frac{5}{1+2i} == 1-2i
i^3 == -i
(1+i)^2 == 2i
1:2 == \frac12
1:2:3 == 2:4:6 != 1:3:2
3\frac{1}{2} == 7/2 == 3.5 != \frac{3}{2}
3 \frac{x}{2} == \frac{3x}{2}
-1\frac{1}{4} == -1.25
1011_2 == 1011_{2} == 11 != 1011
0x1F != 31x
x = \pm\sqrt{3} == x=\sqrt3 \text{ or } x=-\sqrt3 == \pm\sqrt{3} != \sqrt{3} == -\sqrt{3},\sqrt{3}
\pm 1 \pm \sqrt2 == 1+\sqrt2,1-\sqrt2,-1+\sqrt2,-1-\sqrt2
x \equiv 3 \pmod{7} == x \equiv 10 \pmod 7 != x \equiv 3 \pmod 5 == 3 \pmod{7} == x\equiv3\ (\mathrm{mod}\ 7)
x = 3 + 7k == x=7k+3 != x=7k+4
\frac{a}{b} != \frac{b}{a}
a^b != b^a
\binom{n}{2} == \frac{n(n-1)}{2} == \frac{n^2-n}{2}
\binom{2n}{n} == \frac{(2n)!}{(n!)^2} != \binom{2n}{n-1}
\sum_{k=1}^{n} k == \frac{n(n+1)}{2} != n^2
\sum_{k=1}^{n} k^2 == \frac{n(n+1)(2n+1)}{6}
\prod_{k=1}^{n} k == n!
\max(1,2) == 2
\gcd(12,18) == 6
\operatorname{lcm}(4,6) == 12
\lfloor 2.7 \rfloor == 2
\lfloor -2.5 \rfloor == -3
7 \bmod 3 == 1
\infty == +\infty == infinity != -\infty != 0
\text{undefined} == undefined
\text{DNE} == DNE
\text{none} == none
(-1)^n == \cos(n\pi)
\frac{1+(-1)^n}{2} != 1
\theta = \frac{\pi}{3} == \pi/3
\vec{v}=(1,2) == (1,2)
\overline{AB}=5 == 5
AB = 5 == 5
P(A)=\frac13 == \frac13
\frac{dy}{dx} = 2x == 2x
\sqrt[4]{16} == 2
\sqrt[n]{x} == x^{1/n}
x^{\frac{3}{2}} == x\sqrt{x}
\sqrt{a}\sqrt{b} == \sqrt{ab}
4 \sqrt{3} / 3 == \frac{4\sqrt3}{3}
10\sqrt{3}+\frac{5\pi}{3} == \frac{30\sqrt{3}+5\pi}{3} != \frac{10\sqrt{3}+5\pi}{3}
0.1\overline{6} == \frac16
0.\overline{142857} == \frac17
0.\overline{9} == 1
1.\overline{3} == \frac43
\frac{1}{3} != 0.3 != 0.34
2/3 == 0.6666666666667 != 0.67
\sqrt{2}/2 == 0.70710678118 != 0.707
0.70710678118 != 0.70710678119
½ == 0.5
x² == x^2
x₁ == x_1
√3 == \sqrt{3}
2√3 == 2\sqrt{3}
2×10³ == 2000
（1，2） == (1,2)
3−2 == 1
≥5 != 5
x ≥ 5 == x \ge 5
3 \le n \le 5 == n \in [3,5]
9! \cdot 2 == 725760
12 \cdot 11 \cdot 10 == 1320
12\cdot 11\cdot 10 != 12+11+10
2^3\cdot 3^2 == 72
2^{3}\cdot 3^{2}\cdot 5 == 360 != 2^{2}\cdot 3^{3}\cdot 5
\frac{2^{2020}+1}{3} != \frac{2^{2020}-1}{3} == \frac{1+2^{2020}}{3}
2^{2020}+1 != 2^{2020}
7^{2023} != 7^{2022}\cdot 8 == 7 \cdot 7^{2022}
\text{2 or 3} == 2,3
\frac{1}{2}, \frac{1}{3} == 1/3, 1/2
5\text{ m} == 5 m != 6 m
0.64\text{ N} == 0.64N
10 \text{ m/s}^2 == 10\ \mathrm{m/s^2} == 10 \text{ m}\cdot\text{s}^{-2}
9.8 \mathrm{~m} / \mathrm{s}^{2} == 9.8
5 \mathrm{~km} == 5000 \text{ m}
x^{2}-2 x+2 == g(x)=x^2-2x+2
\|v\| == |v|
\sinh^{-1} x == \ln(x+\sqrt{x^2+1})
\frac{d}{dx} x^2 == \frac{d}{dx}x^{2}
\epsilon == \varepsilon
2<x<3 == x \in (2,3)
x > 2 \text{ and } x < 3 == (2,3)
x>2, x<3 == (2,3)
2 \leq a < 3 == [2,3)
a \in [2,3) == 2 \leq a < 3
a<2 \lor a>3 == (-\infty,2)\cup(3,\infty)
(-\infty,-3]\cup[3,\infty) == x \leq -3 \text{ or } x \geq 3 == \left(-\infty,-3\right]\bigcup\left[3,+\infty\right)
[2,5) == 2\le x<5 != 2<x<5 != (2,5]
(-1,3) != x>-1
x=0, x=\pm 2 == 0, 2, -2 == \{0,\pm2\}
\left\{-1, \frac{1}{2}\right\} == \left\{\frac12,-1\right\}
x_1 = 2, x_2 = 3 == 2,3 == 3,2
\begin{cases} x=1 \\ y=2 \end{cases} == x=1, y=2 == (1,2)
4x^2+4x+1 == (2x+1)^2 != (2x-1)^2
\sec^2 x == 1+\tan^2 x != 1-\tan^2 x
\frac{\sin x}{\cos x} == \tan x
2\sin^2\frac{x}{2} == 1-\cos x
\sqrt{x}\cdot\sqrt{x} == x
\frac{1}{\sqrt{2}+1} == \sqrt{2}-1
\frac{x^3-1}{x-1} == x^2+x+1
x^3 != 3x
x^{-1} == \frac1x
(x^2)^3 == x^6 != x^5
x^{2^3} == x^8
e^{\ln 5} == 5
\ln e^3 == 3
\log_3 81 == 4 != 3
\cos 60^\circ == \frac{1}{2}
\sin(\pi/6) == 0.5
\tan 45^\circ == 1 != 45
\sqrt{-1} == i
(2+i)(2-i) == 5
|3+4i| == 5
\overline{3+4i} != 3+4i
-i == i^3
2e^{i\pi/2} == 2i
\frac{1}{i} == -i
\text{yes} != \text{no}
\text{Yes, because it is even} == \text{Yes, because it is even}
\text{parallelogram} == parallelogram != \text{rhombus}
\text{red} == red
\text{Saturday} == \text{ Saturday }
A == \text{A} == (A) == \mathbf{A} == \text{A.} == A) != B != a != AB
B == \textbf{(B)} == \text{Option B} == (B)\ 12
\text{(B) } 12 == B
C,D == D,C
ACD == ACD != ABD
1/3 == \frac{1}{3}
1 / 3 == 1/3
-1/3 == \frac{1}{-3}
-(1/3) == -\frac13
\frac{-1}{3} != \frac{1}{3}
0 == 0.0 == -0 == 00
1 != 0.999999999999
0.5 == .5 == 5 \times 10^{-1} == 5e-1 == 50\% == \frac{50}{100}
12.50 == 12.5
12.5 != 12.05
3.0 == 3
100.0 == 100
1e3 == 1000
1E3 == 1000
1.5e-3 == 0.0015 != 1.5
4.5 \times 10^{33} == 4.5\cdot10^{33} == 45 \times 10^{32} != 4.5 \times 10^{-33}
2^{99}-1 == -1+2^{99} != 2^{99}+1
99! != 100!
100! == 100 \cdot 99!
\frac{20!}{18!} == 380
3^{100}-3^{99} == 2\cdot 3^{99}
1/2^{99} == 0.5^{99}
10^{10^{10}} == 10^{10^{10}} != 10^{10^{9}}
10^{10^{10}}+1 != 10^{10^{10}}
(10^9)! == (10^{9})!
2^{2^{2^{2^{2}}}} == 2^{65536}
1234_5 == 1234_{5} == (1234)_5 == 1234_{\text{five}} == 194 != 1234 != 1234_6 == 1234 \text{ base } 5 == 1234_{(5)}
30 \text{ minutes} == 30 \text{ min} == 30 minutes != 30 \text{ hours}
30 == 30 \text{ cm}^2 == 30\,\mathrm{cm} == 30\text{ cubic units} == 30 people != 30 thousand != 30x == \$30.00
30 == 30 \text{ dollars} == 30\text{¢}
€30 == €30
30\% == 30 percent == 30\ \% != 70\%
7.5\% == 0.075 == \frac{3}{40}
\frac{1}{2}\% == 0.5\% == 0.005
150\% == 1.5
0.3 == 30\%
2\frac{3}{4} == 2 + \frac{3}{4} == \frac{11}{4} == 2 3/4 == 2\tfrac34 == 2.75 != \frac{6}{4} != 2\frac{1}{4} != 23/4
2\frac34\text{ hours} == 2.75
\pm\frac{1}{2} == \frac12, -\frac12 == -0.5, 0.5 != \frac12
\frac{-1 \pm \sqrt{5}}{2} == \frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2} != \frac{1 \pm \sqrt{5}}{2}
\frac{-1 \pm \sqrt{5}}{2} == -\frac{1}{2} \pm \frac{\sqrt{5}}{2}
2 \pm i == 2+i, 2-i
n \equiv 3 \pmod{5} == n \equiv -2 \pmod 5 == 3 \bmod 5 == n \equiv 3 (mod 5) != n \equiv 3 \pmod{10}
n \equiv 3 \pmod{5} != m \equiv 3 \pmod{5}
n \equiv 0,1 \pmod 4 == n \equiv 0 \text{ or } 1 \pmod{4} == n \equiv 1 \pmod 4 \text{ or } n\equiv 0 \pmod 4
2x+3y=6 == y=2-\frac{2}{3}x == 3y=6-2x == \frac{x}{3}+\frac{y}{2}=1 != 2x+3y=5 != 3x+2y=6 != 6=6 != 2x+3y
x=2 == 2=x == x-2=0 != x^2=4
y^2=4x == x=\frac{y^2}{4} == y^2-4x=0 != y=2\sqrt{x}
\begin{pmatrix} 2 \\ 3 \end{pmatrix} == \left(\begin{matrix} 2 \\ 3 \end{matrix}\right)
\begin{pmatrix} 2 \\ 3 \end{pmatrix} == \left[\begin{array}{c} 2 \\ 3 \end{array}\right]
\begin{pmatrix} 2 \\ 3 \end{pmatrix} == \begin{pmatrix} 2 \\[4pt] 3 \end{pmatrix}
\begin{pmatrix} 2 \\ 3 \end{pmatrix} == \begin{pmatrix} 2 \\ 3 \\ \end{pmatrix}
\begin{pmatrix} 2 \\ 3 \end{pmatrix} != \begin{pmatrix} 2 \\ 3 \\ 0 \end{pmatrix}
\begin{pmatrix} 1/2 & 0 \\ 0 & 1/2 \end{pmatrix} == \frac{1}{2}\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}
\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix} == -2
\frac{\pi}{6}, \frac{5\pi}{6} == \frac{5\pi}{6}, \frac{\pi}{6} == x=\frac{\pi}{6},x=\frac{5\pi}{6}
\frac{\pi}{6}, \frac{5\pi}{6} == 30^\circ, 150^\circ != \frac{\pi}{6}, \frac{\pi}{5}
2\pi r == 2r\pi != \pi r^2
\pi r^2 h == \pi h r^2
4\pi == 4 * pi == 4pi == 12.566370614359172 != 12.57
16:9 == 16 : 9 != 9:16
x:y = 2:3 == 2:3
0.25, 0.5 == 1/4, 1/2
(1,2),(3,4) == (3,4) , (1,2) != (1,4),(3,2)
((1,2),(3,4)) != (1,2)
(1,-2) == (1,-2)
(0,\infty) == x>0 == \mathbb{R}^+
\mathbb{N} == \mathbb{N}
\mathbb{Z} != \mathbb{N}
k\pi, k \in \mathbb{Z} == k\pi
\frac{\pi}{4}+k\pi == k\pi+\frac{\pi}{4}, k \in \mathbb{Z}
n\geq 3 == n \ge 3 == n>=3 != n>3 == 3 \le n
a \leq b == b \geq a != a \geq b
a<b<c == c>b>a != a<c<b
11/2 != 1 1/2
1 1/2 == 3/2
ab != a:b
|y| != y
|x-y| != x-y
34 != 3 4
# all kinds, a third look
-\frac{1}{2} == -0.5 == -\dfrac12
\frac{5}{2} == 5/2 == 2 \frac{1}{2} != \frac{2}{5}
\frac{\pi}{2} == 0.5\pi == \pi \div 2
\frac{a+b}{c} != a+\frac{b}{c}
(x-3)(x+5) == x^2 + 2x - 15 != x^2 - 2x - 15
3(x+2) == 3x+6
3x^2(x-1) == 3x^3-3x^2
x(x+1)(x+2) == x^3+3x^2+2x
\frac{1}{x}+\frac{1}{y} == \frac{x+y}{xy} != \frac{2}{x+y}
n^2+n == n(n+1)
2^{2n} == 4^n != 2^{n+2}
\frac{2^n}{3} != \frac{2n}{3}
\log_a b == \frac{\ln b}{\ln a}
\frac{n!}{(n-2)!} == n(n-1)
\sqrt{50} == 5\sqrt{2} == 5 \cdot \sqrt{2} != 2\sqrt{5}
\sqrt{\frac{2}{3}} == \frac{\sqrt{6}}{3}
\frac{2\sqrt{3}}{3} == \frac{2}{\sqrt{3}}
\sqrt{2+\sqrt{3}} == \frac{\sqrt{6}+\sqrt{2}}{2} != \frac{\sqrt{6}-\sqrt{2}}{2}
\sqrt[4]{8} == 2^{3/4}
\sqrt[3]{16} == 2\sqrt[3]{2} != 4
4\sqrt{2}-\sqrt{3} != 4\sqrt{2}+\sqrt{3}
(1, 2, 3) == (1,2,3) != (1,3,2) != \{1,2,3\} != 1,2,3
(\frac{1}{2}, -\frac{3}{4}) == (0.5, -0.75)
(3, -1), (0, 2) == (0,2), (3,-1) == (0,2) \text{ and } (3,-1) != (3,-1)
x=1, y=2, z=3 == (x,y,z)=(1,2,3) == (1,2,3) == z=3, y=2, x=1 != x=1, y=3, z=2
45^\circ == 45 \text{ degrees} == 45 == \pi/4 != 54^\circ
[0, 1] == 0 \leq x \leq 1 != (0, 1) != [0, 1)
(-\infty, 3) == x < 3 != (-\infty, 3] == \{x \mid x < 3\} == \{x \in \mathbb{R} \mid x < 3\}
(-2, 1) \cup (1, 4) == x \in (-2,1) \cup (1,4) == -2 < x < 4, x \neq 1 == (-2,4) \setminus \{1\} != (-2, 4)
x \le 0 \text{ or } x \ge 5 == (-\infty, 0] \cup [5, \infty) != 0 \le x \le 5
\text{Friday} == Friday == \textbf{Friday}
\text{isosceles} != \text{scalene}
\text{Yes} == \text{Yes.}
\text{No} != \text{Yes}
\text{(A)} == A == \text{A} != \text{B}
2+3i == 3i+2 != 2-3i != 3+2i
\frac{3}{2}+\frac{\sqrt{3}}{2}i == \frac{3+i\sqrt{3}}{2} == \frac{3+\sqrt{3}i}{2}
e^{i\pi/4} == \frac{1+i}{\sqrt{2}} == \frac{\sqrt{2}}{2}+\frac{\sqrt{2}}{2}i
3x-4y=12 == 4y=3x-12 == y=\frac{3}{4}x-3 != 3x+4y=12
y=x^2-4x+3 == y=(x-1)(x-3) == y=(x-2)^2-1 == x^2-4x+3 != y=x^2+4x+3
x^2+y^2=25 == x^2+y^2-25=0 != x^2+y^2=5
\frac{x^2}{9}-\frac{y^2}{16}=1 == 16x^2-9y^2=144
\begin{pmatrix} 3 & -1 \\ 0 & 2 \end{pmatrix} == \begin{bmatrix} 3 & -1 \\ 0 & 2 \end{bmatrix}
\begin{pmatrix} 3 & -1 \\ 0 & 2 \end{pmatrix} != \begin{bmatrix} 3 & 0 \\ -1 & 2 \end{bmatrix}
\begin{pmatrix} 3 \\ -1 \end{pmatrix} != \begin{pmatrix} 3 & -1 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} == \begin{pmatrix} 1\\2\end{pmatrix}
110_2 == 110_{2} == 6 != 110 != 111_2
321_4 == 321_{four}
3A_{12} == 3A_{12}
12\text{ cm} == 12\text{cm} == 12 \, \text{centimeters} != 12\text{ cm}^3
12 \text{ square inches} == 12\text{ in}^2
20 \text{ mph} == 20 \text{ miles per hour} == 20
2.5 \text{ hours} == 2.5 == 150 \text{ minutes}
6 \text{ feet} == 72 \text{ inches} != 6 \text{ inches}
\$3.50 == 3.5 == \$3.5 == 3.50 \text{ dollars} == 350 \text{ cents} != \$3.05
\$1,000,000 == 1000000
40\% == 40 == 0.4 == \frac{2}{5} == 2/5 != 60\% != 4
12.5\% == 12.5
2^{31}-1 == 2147483647 != 2^{31}
3^{10} == 59049 != 3^{9}
7! == 5040 != 6!
\frac{8!}{4!4!} == 70 == \binom{8}{4}
2^{50}\cdot 3^{20} == 3^{20} \times 2^{50} != 2^{20}\cdot 3^{50}
5^{-3} == \frac{1}{125} != -125
3\frac{2}{5} == \frac{17}{5} == 3.4 != \frac{6}{5} == 3\ \frac{2}{5}
x = 3 \pm \sqrt{7} == 3+\sqrt{7}, 3-\sqrt{7} == x = 3+\sqrt{7} \text{ or } x = 3-\sqrt{7} != 3 + \sqrt{7}
x = 3 \pm \sqrt{7} != x = 3 \pm \sqrt{5}
\frac{2 \pm \sqrt{10}}{3} == \frac{2}{3} \pm \frac{\sqrt{10}}{3}
\{1, 4, 9\} == \{9, 4, 1\} == 1, 4, 9 != \{1, 4\}
\{-1, 0, 1\} == \{0, \pm 1\}
\{x, y\} == \{y, x\}
x \equiv 5 \pmod{8} == x \equiv 13 \pmod{8} == x \equiv 5 \pmod 8 == x = 8k+5 != x \equiv 3 \pmod{8} != 5
1.23 \times 10^{5} == 123000 == 123{,}000 == 1.23e5 == 1.23 \cdot 10^5 == 12.3 \times 10^4 != 1.23 \times 10^{4}
1.6 \times 10^{-19} == 1.6e-19 == 1.6 \times 10^{-19} \text{ C} != 1.6 \times 10^{19}
0.125 == \frac18 == 12.5\% != 0.0125
0.1 + 0.2 == 0.3
f(x) = 2x^2 - 3 == 2x^2-3 == f(x)=-3+2x^2 != f(x) = 2x^2+3
f(x) = \sin x + C == \sin x + C
f^{-1}(x) = \frac{x-1}{2} == \frac{x-1}{2} == y = \frac{x-1}{2}
k = \frac{3}{4} == \frac{3}{4} == 0.75 != k = \frac{4}{3}
n = 7 == 7 == \boxed{7} != n > 7 != n \neq 7
a_{10} = 55 == 55
\triangle ABC == \triangle ABC
\lambda = 2, 3 == 2, 3
\angle A = 60^\circ, \angle B = 30^\circ == 60^\circ, 30^\circ
\dfrac{\sqrt{5}-1}{2} == \dfrac{-1+\sqrt{5}}{2}
1 - \frac{1}{2^{10}} == \frac{1023}{1024} != \frac{1}{1024}
\frac{1}{1 - x} == -\frac{1}{x-1}
\frac{x}{|x|} != 1
\max\{a, b\} == \max(a,b)
\min\{2,3\} == 2
\lfloor \sqrt{n} \rfloor == \left\lfloor\sqrt n\right\rfloor
\left(\frac{2}{3}\right)^{n} == \frac{2^n}{3^n} != \frac{2}{3^n}
(-1)^{n+1} == (-1)^{n-1} != (-1)^n
\frac{2}{3}\pi r^3 == \frac{2\pi r^3}{3}
\ln 2 == \log_e 2 != \log_{10} 2
\ln\left(\frac{x}{y}\right) == \ln x - \ln y
\tan\theta == \frac{\sin\theta}{\cos\theta}
\sin 75^\circ == \frac{\sqrt{6}+\sqrt{2}}{4}
\text{None of the above} == None of the above
9:00 \text{ AM} == 9:00 AM
10:30 != 10:31
3:4:5 == 3 : 4 : 5
1,2,\ldots,n == 1, 2, \dots, n
2, 4, 6, 8 != 2, 4, 6
1,000,001 != 1,000,000
1.0 == 1
-0.75 == -\frac{3}{4}
+\frac{1}{2} == \frac12
2.0 \times 10^{2} == 200
"""

# Equal pairs of the table that the grader does not see as equal, each for want of a rule that would be worth its lines.
GAPS = {
    (r"12", r"\text{The answer is } 12"),
    (r"12", r"12 \text{ (approx)}"),
    (r"xy=1", r"y=\frac1x"),
    (r"n \equiv 3 \pmod{5}", r"3 \bmod 5"),
    (r"n \equiv 0,1 \pmod 4", r"n \equiv 1 \pmod 4 \text{ or } n\equiv 0 \pmod 4"),
    (r"(0,\infty)", r"\mathbb{R}^+"),
    (r"x \equiv 5 \pmod{8}", r"x = 8k+5"),
}


def box(text) -> str:
    return f"so the answer is $\\boxed{{{text}}}$."


def pairs() -> dict[str, list[tuple[str, str, bool]]]:
    """kind -> (gold, answer, equal)."""
    kinds: dict[str, list] = {}
    for line in TABLE.strip().splitlines():
        if line.startswith("# "):
            kind = kinds.setdefault(line[2:], [])
            continue
        gold, *rest = re.split(r" (==|!=) ", line)
        kind += [(gold, answer, sign == "==") for sign, answer in zip(rest[::2], rest[1::2])]
    return kinds


def any_of(gold) -> list:
    return gold if isinstance(gold, list) else [gold]


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def cases(name: str) -> list[dict]:
    return [json.loads(line) for line in shared(f"graders/{name}").read_text().splitlines()]


def benchmarks() -> dict[str, list]:
    mirror = shared("upstream")
    return {name: data.load(name, mirror=str(mirror)) for name in data.download.FILES}


def benchmark_golds() -> dict[str, list]:
    return {
        name: [list(problem.answers) for problem in problems]
        for name, problems in benchmarks().items()
    }


# -- what is equal


@pytest.mark.parametrize("kind", pairs())
def test_table(kind):
    wrong = [
        (gold, answer, equal)
        for gold, answer, equal in pairs()[kind]
        if (gold, answer) not in GAPS
        and (grade(box(answer), gold), grade(box(gold), answer)) != (equal, equal)
    ]
    assert not wrong


def test_known_gaps_are_equal_pairs_that_are_missed_and_never_the_reverse():
    labels = {(gold, answer): equal for kind in pairs().values() for gold, answer, equal in kind}
    assert all(labels[pair] for pair in GAPS)
    assert not [pair for pair in GAPS if grade(box(pair[1]), pair[0])]
    assert len(GAPS) < 0.02 * sum(labels.values())


def test_public_regression_cases():
    right = {True: [], False: []}
    for case in cases("dev.jsonl"):
        if (case["source"], case["gold"], case["response"]) not in DISAGREED:
            right[case["expected"]].append(
                grade(case["response"], case["gold"]) == case["expected"]
            )
    assert len(right[True]) + len(right[False]) + len(DISAGREED) == 416
    assert sum(right[True]) >= 0.99 * len(right[True])
    assert sum(right[False]) == len(right[False])


def test_every_gold_grades_itself_right_and_reads_as_an_answer():
    golds = benchmark_golds()
    assert {name: len(rows) for name, rows in golds.items()} == {
        "deepscaler-hard-1k": 1000,
        "aime": 30,
        "amc": 83,
        "math": 500,
        "minerva": 272,
        "olympiad_bench": 675,
        "gsm8k": 1319,
        "gsm8k-train": 7473,
    }
    for name, rows in golds.items():
        for gold in rows:
            for one in any_of(gold):
                boxed = str(one) if "\\boxed" in str(one) else box(one)
                bare = final_answer(str(one)) or str(one)
                assert grade(boxed, gold) and grade(boxed, one) and grade(box(bare), one), (
                    name,
                    one,
                )
                # spelt another way, so that it is the value that is compared and not the text
                if score(box(bare), "1")[0]:
                    assert grade(box("\\, " + bare.replace("\\frac", "\\dfrac")), one), (name, one)
    texts = {str(one) for rows in golds.values() for gold in rows for one in any_of(gold)}
    assert (
        sum(score(text if "\\boxed" in text else box(text), "1")[0] for text in texts)
        >= len(texts) - 2
    )


@pytest.mark.parametrize(
    "constant",
    ["0", "1", "2", "\\frac{1}{2}", "x", "A", "\\infty", "0=0", "1,2", "(0,1)", "\\{\\}", "x=x"],
)
def test_a_constant_answer_is_worth_its_share_only(constant):
    for name, golds in benchmark_golds().items():
        hits = sum(grade(box(constant), gold) for gold in golds)
        share = sum(
            not {constant, constant + ".0"}.isdisjoint(map(str, any_of(gold))) for gold in golds
        )
        assert hits <= max(share + 5, 0.06 * len(golds)), (name, hits)


def test_shuffled_golds_score_about_nothing():
    for name, golds in benchmark_golds().items():
        first = [str(any_of(gold)[0]).replace("\\boxed", "") for gold in golds]
        shuffled = random.Random(0).sample(first, len(first))
        right = sum(accuracy for _, accuracy in score_all([box(text) for text in shuffled], golds))
        assert right <= max(2, 0.03 * len(golds)), name


def test_golds_of_every_type():
    assert (
        grade(box("14"), 14)
        and grade(box("14"), 14.0)
        and grade(box("14.0"), 14)
        and grade(box("0.5"), 0.5)
    )
    assert not grade(box("15"), 14) and not grade(box("14.5"), 14) and not grade(box("0.33"), 1 / 3)
    assert (
        grade(box("2"), ["1", 2])
        and grade(box("2"), ("1", "2"))
        and grade(box("2"), ["1", ["3", 2.0]])
    )
    assert not grade(box("3"), ["1", 2]) and not grade(box("3"), [])
    for nothing in (None, "", " ", "$$", [], [None], ["", None]):
        assert (
            not grade(box(""), nothing)
            and not grade(box("None"), None)
            and not grade(box("nan"), float("nan"))
        )
    assert not grade(box("inf"), float("nan"))


# -- the box and the format reward


@pytest.mark.parametrize(
    "response, expected",
    [
        ("\\boxed{1}", "1"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed {3}", "3"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{ \\boxed{4}, 5}", " \\boxed{4}, 5"),
        ("\\\\boxed{5}", "5"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("}}\\boxed{1}}", "1"),
        ("{{\\boxed{1}", "1"),
        ("\\boxed{}", ""),
        ("\\boxed{1", None),
        ("\\boxed", None),
        ("", None),
        ("1", None),
        ("\\boxed 1", None),
        ("\\boxed{" * 2000 + "\\boxed{7}", "7"),
    ],
)
def test_final_answer(response, expected):
    assert final_answer(response) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("5", 1.0),
        ("\\frac{1}{2}", 1.0),
        ("x=5", 1.0),
        ("\\text{east}", 1.0),
        ("yes", 1.0),
        ("(1,2)", 1.0),
        ("", 0.0),
        (" ", 0.0),
        ("2+", 0.0),
        ("\\frac{1}", 0.0),
        ("\\foo\\bar{\\baz}", 0.0),
        ("(1,2", 0.0),
        ("*", 0.0),
        ("1 2 3", 0.0),
        ("\\left\\left", 0.0),
        ("_", 0.0),
    ],
)
def test_format_reward_is_a_closed_box_that_parses(answer, expected):
    assert score(box(answer), "12345") == (expected, 0.0)
    assert score(f"the answer is {answer}", "12345") == (0.0, 0.0)


def test_score_of_a_right_answer():
    assert score(box("0.5"), "\\frac12") == (1.0, 1.0)
    assert score("0.5", "\\frac12") == (0.0, 0.0)


def test_score_all_equals_score_one_by_one():
    rows = [(gold, answer) for kind in pairs().values() for gold, answer, _ in kind[:4]]
    rows += [("1", "x" * 30_000), ("1", "")]
    responses, golds = [box(answer) for _, answer in rows], [gold for gold, _ in rows]
    one_by_one = [score(response, gold) for response, gold in zip(responses, golds)]
    assert score_all(responses, golds) == one_by_one
    with pytest.raises(ValueError):
        score_all(responses, golds[1:])


# -- hostile text


def test_hostile_cases():
    for case in cases("hostile.jsonl"):
        started = time.monotonic()
        verdict = grade(case["response"], case["gold"])
        assert time.monotonic() - started < 10, case["id"]  # a hang; bench_reward.py measures
        acceptable = "acceptable" in case["note"] or case["expected"] == "either"
        assert verdict == case["expected"] or acceptable and not verdict, (case["id"], case["note"])
    assert not list(Path("/tmp").glob("pwned_*"))


def test_no_text_is_executed(tmp_path):
    target = tmp_path / "pwned"
    code = f"__import__('pathlib').Path('{target}').touch()"
    for text in (
        code,
        f"\\frac{{{code}}}{{1}}",
        f"[{code}]",
        f"x={code}",
        f"\\int_0^1 {code} dx",
        f"\\lim_{{x \\to 0}} {code}",
        f'sympify("{code}")',
    ):
        for gold in ("0", "x", "\\frac{1}{2}", text.replace("0", "1"), "(1,2)"):
            grade(box(text), gold)
            grade(box(gold), text)
    assert not target.exists()


def test_a_fresh_process_grades_a_batch_as_a_warm_one_does():
    """The first answers must not be lost to the start of sympy, or a resumed run would have other rewards."""
    code = r"import reward; print(reward.score_all([r'\boxed{\int_0^1 x^2 dx}'] * 4, ['1/3'] * 4))"
    fresh = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert fresh.stdout.strip() == str([(1.0, 1.0)] * 4), fresh.stderr


def calls_and_names(tree: ast.AST) -> tuple[set, set]:
    nodes = list(ast.walk(tree))
    called = {
        node.func.id
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return called, names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_source_uses_only_sympy_and_the_standard_library_and_no_parser_of_theirs():
    files = [ROOT / "reward.py", *sorted((ROOT / "grading").glob("*.py"))]
    assert len(files) > 5
    for path in files:
        tree = ast.parse(path.read_text())
        nodes = list(ast.walk(tree))
        imports = {
            alias.name.split(".")[0]
            for node in nodes
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imports |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        assert imports <= set(sys.stdlib_module_names) | {"sympy", "mpmath", "grading"}, path
        assert "sympy" not in imports or path.name == "sympy_process.py"
        called, names = calls_and_names(tree)
        assert not called & {"eval", "exec", "compile", "__import__"}, path
        assert not names & {
            "sympify",
            "parse_expr",
            "parse_latex",
            "S",
            "literal_eval",
            "pickle",
            "alarm",
            "SIGALRM",
            "ITIMER_REAL",
            "workdps",
            "workprec",
            "extradps",
            "extraprec",
        }, path
        timers = lambda part: [
            node.attr for node in ast.walk(part) if getattr(node, "attr", "") == "setitimer"
        ]
        serves = [
            node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "serve"
        ]
        assert timers(tree) == [
            timer for serve in serves for timer in timers(serve)
        ]  # nothing rings in our process


def test_the_precision_of_the_numbers_is_never_changed():
    """mpmath's sec, cot and csc would change it for the time of a call, for all threads."""
    from grading.value import mp

    precisions = set()
    watch = type(mp).prec.fget
    digits = watch(mp)
    rows = [row for kind in pairs().values() for row in kind]
    previous, type(mp).prec = (
        type(mp).prec,
        property(watch, lambda self, value: precisions.add(value)),
    )
    try:
        for gold, answer, _ in rows:
            grade(box(answer), gold)
    finally:
        type(mp).prec = previous
    assert not precisions and watch(mp) == digits


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "\ud800",
        "\u202e42",
        "\\",
        "\\\\",
        "{" * 3_000_000,
        "}" * 3_000_000,
        "\\boxed{" * 400_000,
        "((((" * 50_000,
        "$" * 10**6,
        "1," * 9_000,
        "\\frac" * 4000,
        "\\left(" * 3000,
        "^" * 10_000,
        "!" * 10_000,
        "-" * 15_000,
        "1" + "!" * 5000,
        "x" + "^2" * 5000,
        "\\text{" * 3000,
        "|" * 9000,
        "\\begin{pmatrix}" * 1000,
        "\\sqrt" * 3000,
        "1+" * 900 + "1",
        "1/" * 900 + "1",
        "\\cup".join(["[0,1]"] * 300),
        "\\pm" * 500 + "1",
        "9" * 19_000,
        "9^9^9^9^9^9",
        "((9!)!)!",
        "1e999999999999",
        "10^{-10^{20}}",
        "\\sin(10^{40})",
        "\\binom{10^5}{5\\cdot10^4}",
        "\\sum_{k=1}^{9000}k^k",
        "\\sum_{i=1}^{99}\\sum_{j=1}^{99}\\sum_{k=1}^{99}\\sin(ijk)",
        "e^{e^{e^{20}}}",
        "(1+i)^{10^{12}}",
        "\\lfloor 10^{10^6}/7 \\rfloor",
        "0^0",
        "\\frac{0}{0}",
        "\\infty-\\infty",
        "\\tan\\frac{\\pi}{2}",
        "x_{" * 2000,
        "{x | " * 50,
        "1_2_3_4",
        "\\gcd(10^{30},10^{29}+1)",
        "1:2:3:4:5",
        "=" * 2000,
        "x" * 19_000,
    ],
)
def test_awkward_text_is_answered_at_once(text):
    for gold in ("1", "\\sqrt{2}", "x^2+1", "1,2", "(0,1)", text[:2000] + "1"):
        started = time.monotonic()
        grade(box(text), gold)
        score("\\boxed{" + text, gold)
        assert time.monotonic() - started < 10  # typically milliseconds, see bench_reward.py


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = [*"0123456789+-*/^_=<>()[]{}|,;:!'%&. xyzabnie\n$"]
    pieces += r"\frac \sqrt \text{ \left \right \pm \cup \in \{ \} \begin{pmatrix} \end{pmatrix} \\ \sin \log".split()
    pieces += r"\infty \pi \circ \pmod \ldots \binom \sum_{k=1}^ \%".split()
    golds = [gold for kind in pairs().values() for gold, _, _ in kind]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        gold = rng.choice(golds)
        cut = rng.randrange(len(gold))
        assert score(box(text), gold)[1] in (0.0, 1.0)
        grade(box(gold[:cut] + rng.choice(pieces) + gold[cut:]), gold)
        grade(box(gold), text)


def test_a_caller_at_the_edge_of_the_recursion_limit_gets_an_answer():
    def deep(levels: int) -> bool:
        return (
            deep(levels - 1)
            if levels
            else grade(box("\\sqrt{\\frac{1}{1+\\frac{1}{2}}}"), "\\sqrt{\\frac{2}{3}}")
        )

    used = len(__import__("inspect").stack())
    for margin in range(40, 200, 10):
        assert deep(sys.getrecursionlimit() - used - margin) in (True, False)


# -- the process that has sympy

SLOW = "\\int_0^{\\infty} \\frac{\\sin(x^3+x)}{e^{x^2}+\\cos x} dx"
NEEDS_SYMPY = [
    ("\\int_0^1 x^2 dx", "\\frac13"),
    ("\\lim_{x \\to 0} \\frac{\\sin x}{x}", "1"),
    ("\\sum_{k=1}^{1000000000} k", "500000000500000000"),
]


@pytest.fixture
def warm():
    """The id of a sympy process that has started, however slow the machine."""
    assert sympy_process.ask("1", ["1"], patience=120.0) is True
    return sympy_process.running().pid


def test_limits_integrals_and_long_sums(warm):
    for answer, gold in NEEDS_SYMPY:
        assert grade(box(answer), gold) and not grade(box(answer), gold + "1"), answer


def test_nothing_is_started_or_imported_for_simple_answers():
    program = (
        "import sys, reward\nfrom grading import sympy_process\n"
        "rows = [('14', '14'), ('\\\\frac12', '0.5'), ('\\\\text{east}', 'east'), ('x+1', '1+x')]\n"
        "for a, g in rows:\n"
        "    assert reward.grade('\\\\boxed{' + a + '}', g)\n"
        "assert not {'sympy', 'torch', 'numpy'} & set(sys.modules)\n"
        "assert not sympy_process._running\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def test_a_poisoned_process_is_replaced_and_good_answers_follow(warm):
    started = time.monotonic()
    assert not grade(box(SLOW), "2")
    assert time.monotonic() - started < 10
    assert not Path(f"/proc/{warm}").exists()  # killed and reaped
    assert grade(box("\\frac{\\sqrt{3}}{3}"), "\\frac{1}{\\sqrt{3}}")
    assert sympy_process.ask("1", ["1"], patience=120.0) is True
    assert grade(box(NEEDS_SYMPY[0][0]), NEEDS_SYMPY[0][1])


def test_a_killed_process_is_replaced(warm):
    os.kill(warm, signal.SIGKILL)
    grade(box(NEEDS_SYMPY[0][0]), NEEDS_SYMPY[0][1])  # may be lost
    assert sympy_process.ask("1", ["1"], patience=120.0) is True


def test_the_process_has_limits_on_memory_and_processor_time(warm):
    limits = Path(f"/proc/{warm}/limits").read_text()
    assert re.search(rf"Max address space\s+{sympy_process.MEMORY} ", limits)
    started = time.monotonic()  # nobody waits less than two minutes for this answer
    assert (
        sympy_process.ask(SLOW, ["2"], patience=120.0) is False and time.monotonic() - started < 60
    )
    assert not Path(f"/proc/{warm}").exists()


def test_any_thread_and_several_graders_at_once(warm):
    rows = [row for kind in pairs().values() for row in kind[:6] if row[:2] not in GAPS]
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda row: grade(box(row[1]), row[0]), rows * 2))
    assert verdicts == [row[2] for row in rows * 2]
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(grade(box(NEEDS_SYMPY[0][0]), NEEDS_SYMPY[0][1]))
    )
    thread.start()
    thread.join(60)
    assert verdicts == [True]


def test_a_forked_child_grades_with_a_process_of_its_own(warm):
    child = os.fork()
    if not child:
        own = sympy_process.ask("1", ["1"], patience=120.0)
        own = own and sympy_process.running().pid != warm
        sympy_process.end()
        os._exit(0 if own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sympy_process.ask("1", ["1"], patience=120.0) is True


def test_no_process_outlives_a_killed_parent():
    program = (
        "import time\nfrom grading import sympy_process\nsympy_process.ask('1', ['1'], patience=120.0)\n"
        "print(sympy_process.running().pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        process = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        if (
            not Path(f"/proc/{process}/cmdline").exists()
            or not Path(f"/proc/{process}/cmdline").read_bytes()
        ):
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")
